"""Links of the documents: files and headings exist, code is where a link says."""

import re

import pytest

from docs.links import ROOT, TO_CODE, documents, line_of, updated

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATHS = [path.relative_to(ROOT).as_posix() for path in documents()]


def anchors(document):
    """What GitHub calls the headings of a document: lower case, punctuation gone, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PATHS)
def test_links_lead_somewhere(path):
    wrong = []
    for target in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / path).parent / name if name else ROOT / path
        if not file.exists() or file.suffix == ".md" and anchor and anchor not in anchors(file):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("path", PATHS)
def test_links_to_code_are_on_its_line(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text == updated(ROOT / path), "python -m docs.links puts them right"
    assert len(TO_CODE.findall(text)) == len(re.findall(r"\.py#L", text)), "a link to a line names what stands there"


def test_a_line_is_found_by_name(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("A = 1\n\n\nclass B:\n    x: int = 0\n\n    def c(self):\n        pass\n\n\ndef d():\n    pass\n")
    assert [line_of(file, name) for name in ("A", "B", "B.x", "B.c", "d")] == [1, 4, 5, 7, 11]
    with pytest.raises(KeyError):
        line_of(file, "c")
