"""The pages of the course: the same headings in each, links to code, pictures that exist."""

import re

import pytest
from commands import commands

from docs.course.pictures import PICTURES
from docs.links import ROOT, TO_CODE

COURSE = ROOT / "docs" / "course"
PAGES = sorted(path.stem for path in COURSE.glob("*.md") if path.stem != "README")
HEADINGS = ["想法", "公式", "在代码的哪里", "手算一个例子", "曲线该是什么样", "出了问题", "练习"]


def read(page):
    return (COURSE / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_the_same_parts(page):
    text = read(page)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert len(TO_CODE.findall(text)) >= 3
    assert len(commands(text)) >= 4, "one to run the stage, and three exercises"
    assert page in PICTURES and f"({page}.png)" in text and (COURSE / f"{page}.png").exists()


def test_no_picture_is_left_over():
    assert sorted(PICTURES) == PAGES
    assert sorted(path.stem for path in COURSE.glob("*.png")) == PAGES


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\((\w+)\.md\)", read("README"))
    assert sorted(listed) == PAGES
