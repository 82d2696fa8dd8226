"""The commands of the documents: where they stand, what they call, and what is said of those that no test runs."""

import importlib
import re
import shlex
import sys
from pathlib import Path

from docs.links import ROOT

# what a comment behind a command says of it, if it is not to be run
MARKS = ("需要显卡", "八张显卡", "要联网", "几小时", "一直运行", "的检查点", "约十五分钟", "运行全部测试", "几分钟")
STAGE = re.compile(r'parse_config\(\s*"(\w+)"')


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text):
    """(command, comment) of each command in a text's blocks of bash, lines that go on joined."""
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S):
        for line in block.replace("\\\n", "").splitlines():
            command, _, comment = re.sub(r"(^|\s)# ", r"\1\0", line).partition("\0")
            if command.strip():
                found.append((" ".join(command.split()), comment))
    return found


def inline(text):
    """Commands within a line of text, but for those with a gap that the reader fills."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    spans = re.findall(r"`((?:\w+=\S+ )*(?:python|bash|torchrun) [^`\n]+)`", prose)
    return [span for span in spans if not re.search(r"[<…]|\.\.\.", span)]


def words(command):
    """The words of a command, without the environment in front."""
    found = shlex.split(command)
    while "=" in found[0]:
        found.pop(0)
    return found


def script(found):
    """(path of what a python or torchrun command runs, its arguments)."""
    program, *rest = found
    if program == "torchrun":
        while rest[0].startswith("-"):
            rest.pop(0)
    if rest[0] == "-m":
        path = rest[1].replace(".", "/")
        return (f"{path}.py" if (ROOT / f"{path}.py").exists() else f"{path}/__init__.py"), rest[2:]
    return rest[0], rest[1:]


def main_of(path, patch):
    """The function main of a script, its module imported by name; benchmarks import each other from their folder."""
    name = path.removesuffix(".py").replace("/", ".")
    if path.startswith("benchmarks/"):
        patch.syspath_prepend(ROOT / "benchmarks")
        name = Path(path).stem if Path(path).stem != "quantize" else name
    return importlib.import_module(name).main


def call(main, path, arguments, patch):
    """main() as the command line would call it."""
    patch.setattr(sys, "argv", [path, *arguments])
    return main()
