"""README.md and README_en.md say the same, in under 250 lines, and lead to the code in two clicks."""

import re

import pytest
from commands import ROOT, commands, read

NAMES = ("README.md", "README_en.md")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PARALLEL = {
    "code blocks": lambda text: [line for line, _ in commands(text)],
    "snippets": lambda text: [re.sub(r"#.*", "", block) for block in re.findall(r"```python\n(.*?)```", text, re.S)],
    "headings": lambda text: [len(marks) for marks in re.findall(r"^(#+) ", text, re.M)],
    "links": lambda text: [re.sub(r"#(?!L\d).*", "#", link) for link in links(text)],
    "pictures": lambda text: re.findall(r"!\[[^]]*\]\(([^)]+)\)", text),
    "rows": lambda text: [line.count("|") for line in text.splitlines() if line.startswith("|")],
}


def links(text):
    return sorted(link for link in LINK.findall(text) if link not in NAMES)


def numbers(row):
    """The numbers of a row of a table, once each: a language may tell an interval or a share in another order."""
    return set(NUMBER.findall(row))


@pytest.mark.parametrize("name", NAMES)
def test_nobody_has_to_scroll(name):
    assert len(read(name).splitlines()) < 250


@pytest.mark.parametrize("kind", PARALLEL)
def test_both_languages_have_the_same(kind):
    chinese, english = (PARALLEL[kind](read(name)) for name in NAMES)
    assert chinese and english == chinese


def test_both_languages_have_the_same_figures():
    chinese, english = ([row for row in read(name).splitlines() if row.startswith("|")] for name in NAMES)
    assert [(a, b) for a, b in zip(chinese, english, strict=True) if numbers(a) != numbers(b)] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "code", ["dpo_loss dpo_train.py", "gae ppo_train.py", "gptq lowbit/gptq.py", "encode_prompt tokenizer/__init__.py",
             "rules verse/rewards.py"]
)  # fmt: skip
def test_code_is_two_clicks_away(name, code):
    function, path = code.split()
    pages = [ROOT / name, *(ROOT / link for link in links(read(name)) if link.endswith(".md"))]
    found = [page for page in pages if re.search(rf"\[`{function}`\]\([./]*{path}#L\d+\)", page.read_text("utf-8"))]
    assert found
