"""The pages of the course: the same headings in each, links to code, pictures that exist, keys that exist."""

import io
import re
import shlex

import pytest

from common.config import parse_config
from docs.course.pictures import PICTURES
from docs.links import ROOT, TO_CODE

COURSE = ROOT / "docs" / "course"
PAGES = sorted(path.stem for path in COURSE.glob("*.md") if path.stem != "README")
HEADINGS = ["想法", "公式", "在代码的哪里", "手算一个例子", "曲线该是什么样", "出了问题", "练习"]
TWO_NAMES = {"tokenizer.train": "tokenizer", "alignment.ranked": "ranked"}  # a module's config, where not of its name


def read(page):
    return (COURSE / f"{page}.md").read_text(encoding="utf-8")


def commands(text):
    """The words of each command in the bash blocks of a text, without what stands behind # and before `python`."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "python" in words:
                yield words[words.index("python") + 1 :]


def stage_of(words):
    """(the config of a command's stage or None, its arguments)."""
    module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    name = TWO_NAMES.get(module, module)
    return name if (ROOT / "configs" / f"{name}.py").exists() else None, rest


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_the_same_parts(page):
    text = read(page)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert len(TO_CODE.findall(text)) >= 3
    assert page in PICTURES and f"({page}.png)" in text and (COURSE / f"{page}.png").exists()


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_keys_and_values_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [stage_of(words) for words in commands(read(page))]
    assert len(found) >= 4, "one to run the stage, and three exercises"
    for stage, arguments in found:
        if stage:
            parse_config(stage, arguments, "", file=io.StringIO())


def test_keys_are_read_from_commands():
    text = "```bash\nA=1 python sft.py configs/demo/sft.py \\\n    --nonsense=1  # a reason\nls\n```\n"
    ((stage, arguments),) = map(stage_of, commands(text))
    assert (stage, arguments) == ("sft", ["configs/demo/sft.py", "--nonsense=1"])


def test_no_picture_is_left_over():
    assert sorted(PICTURES) == PAGES
    assert sorted(path.stem for path in COURSE.glob("*.png")) == PAGES


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\((\w+)\.md\)", read("README"))
    assert sorted(listed) == PAGES
