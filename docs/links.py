"""Links of the documents to lines of code, kept where the code is.

A document writes [`dpo_loss`](../dpo_train.py#L1), with any number; this puts the line of that definition there.

    python -m docs.links
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TO_CODE = re.compile(r"\[`([\w.]+)(\(\))?`\]\(([\w./-]+\.py)#L(\d+)\)")


def documents():
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def line_of(file, name):
    """The line of a file where a function, class, Class.method or module variable begins; KeyError if none does."""
    body, found = ast.parse(file.read_text(encoding="utf-8")).body, None
    for part in name.split("."):
        named = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                named |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        found = named[part]
        body = getattr(found, "body", [])
    return found.lineno


def updated(document):
    """A document's text, every link to code on the line of what it names."""

    def link(found):
        name, call, path, _ = found.groups()
        return f"[`{name}{call or ''}`]({path}#L{line_of(document.parent / path, name)})"

    return TO_CODE.sub(link, document.read_text(encoding="utf-8"))


def main():
    for document in documents():
        text = updated(document)
        if text != document.read_text(encoding="utf-8"):
            document.write_text(text, encoding="utf-8")
            print(f"{document.relative_to(ROOT)}: links updated")


if __name__ == "__main__":
    main()
