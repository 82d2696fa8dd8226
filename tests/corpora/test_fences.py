"""corpora/fences.py: what is code, and that cleaning leaves it as it is."""

import json
import re

import pytest

from configs.data_process import config
from corpora.clean import clean_text
from corpora.fences import CODE, outside_code

OPTIONS = config["clean"] | dict(mask_personal=True, web_junk=True, join_lines=True)
BODY = "s = 'a  b'  \n\tx = １２３ＡＢＣ\u3000<br>&lt;\n\n\n\ne\u0301 13812345678 \u200b\xa0|  ?\n求月票\n======"
CODES = {
    "fence": f"```python\n{BODY}\n```",
    "no language": f"```\n{BODY}\n```",
    "indented": f"1. 一\n\n    ```python\n    {BODY}\n    ```",
    "quoted": f"> ```\n> {BODY}\n> ```",
    "longer fence": f"````markdown\n```\n{BODY}\n```\n{BODY}\n````",
    "tildes": f"~~~ python\n{BODY}\n~~~",
    "unclosed": f"```python\n{BODY}",
    "unclosed tildes": f"~~~python\n{BODY}",
    "behind words": f"代码如下：```python\n{BODY}\n```",
    "closed behind code": f"```\n{BODY}```\n说明：\n```\n{BODY}\n```",
    "words behind the close": f"```\n{BODY}\n```以上是代码\n```\n{BODY}\n```",
    "backticks within": f"```\nx = `a  b` + '```' + y\n{BODY}\n```",
    "inline": "用`a  b<br>`和``c  `  ｄ``，还有```１  ２```。",
}


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("document", [False, True])
def test_code_stays_as_it_is(name, document):
    assert clean_text(CODES[name], OPTIONS, document) == CODES[name]
    around = f"前文。\n\n{CODES[name]}"
    assert clean_text(around, OPTIONS, document) == around


def test_prose_around_code_is_mended():
    text = "电话13812345678，見  `見  ａ`  和&lt;\n~~~\n見  ｂ\n~~~\n\u3000\u3000好ｃ  \n"
    text += "```\r\n\x00x  y\ud83d \r\n```  \r\nｄ"
    expected = "电话【手机号】，見 `見  ａ` 和<\n~~~\n見  ｂ\n~~~\n好c\n```\nx  y \n```\nd"
    assert clean_text(text, OPTIONS, document=True) == expected


def test_traditional_code_stays():
    pytest.importorskip("opencc")
    assert clean_text("後來`後來`\n```\n後\n```", dict(to_simplified=True)) == "后来`後來`\n```\n後\n```"


def test_what_is_no_code():
    prose = "好吃~~~下次再来~~~\n~~~~~~\n一个`反引号  没有关上\n~~~真的好吃\n２"
    expected = "好吃~~~下次再来~~~\n~~~~~~\n一个`反引号 没有关上\n~~~真的好吃\n2"
    assert clean_text(prose, dict(repair=True), document=True) == expected


def test_outside_code_by_hand():
    def change(prose):
        assert prose == f"a{CODE}{CODE}c{CODE}"  # the second one stood in the text
        return prose.upper()

    assert outside_code(change, f"a`b`{CODE}c```d\n\0", repair=False) == f"A`b`{CODE}C```d\n\0"
    assert outside_code(change, f"a`b`{CODE}c```d\r\n\0", repair=True) == f"A`b`{CODE}C```d\n"


def strings(value):
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(inner)


def test_real_conversations_lose_no_code_markup_or_emoji(shared_data):
    fence = r"(?ms)^```\w*\n.*?^```(?=[ \t]*$)"
    signs = r"</?[a-z]+[^<>\n]*>|&\w+;|[０-９Ａ-Ｚａ-ｚ]|\S(?:  +|\t+)(?=\S)|[❤☺]\ufe0f|[😀-🧿]\u200d"
    kept = re.compile(f"{fence}|{signs}")
    seen = 0
    for path in [*(shared_data / "sft").iterdir(), *(shared_data / "preference").iterdir()]:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        for value in strings(rows):
            value = value.replace("\xa0", " ").replace("\r\n", "\n")
            found = kept.findall(value)
            assert kept.findall(clean_text(value, config["clean"])) == found
            seen += len(found)
    assert seen > 500
