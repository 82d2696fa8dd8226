"""corpora/wrapping.py: paragraphs that a fixed width cut are whole again, and nothing else is joined."""

import pytest

from configs.data_process import config
from corpora.clean import clean_document
from corpora.wrapping import columns, join_lines

# Lu Xun, 故乡 (1921), in the public domain.
PARAGRAPHS = [
    "我冒了严寒，回到相隔二千余里，别了二十余年的故乡去。",
    "时候既然是深冬；渐近故乡时，天气又阴晦了，冷风吹进船舱中，呜呜的响，从篷隙向外一望，苍黄的天底下，远近横着几个萧索的荒村，"
    "没有一些活气。我的心禁不住悲凉起来了。",
    "阿！这不是我二十年来时时记得的故乡？",
    "我所记得的故乡全不如此。我的故乡好得多了。但要我记起他的美丽，说出他的佳处来，却又没有影像，没有言辞了。仿佛也就如此。"
    "于是我自己解释说：故乡本也如此，——虽然没有进步，也未必有如我所感的悲凉，这只是我自己心情的改变罢了，因为我这次回乡，"
    "本没有什么好心绪。",
]
CHAPTER = ["第一章 故乡", *PARAGRAPHS]


def wrapped(paragraphs, width, indent, between, hang):
    """The lines of paragraphs, cut at a width; `hang` lets a sign stand beyond it rather than begin a line."""
    lines = []
    for paragraph in paragraphs:
        rest = indent + paragraph
        while len(rest) > width:
            cut = width
            while hang and cut < len(rest) and rest[cut] in "，。；：！？":
                cut += 1
            lines.append(rest[:cut])
            rest = rest[cut:]
        lines += [rest, *between]
    return "\n".join(line for line in lines if line or between)


@pytest.mark.parametrize("width", [25, 35])
@pytest.mark.parametrize("indent, between", [("\u3000\u3000", []), ("    ", []), ("", [""]), ("\u3000\u3000", [""])])
@pytest.mark.parametrize("hang", [False, True])
def test_paragraphs_are_joined(width, indent, between, hang):
    text = CHAPTER[0] + "\n\n" + wrapped(CHAPTER[1:], width, indent, between, hang)
    assert [line.strip() for line in join_lines(text).split("\n") if line] == CHAPTER
    cleaned, why = clean_document(text, config["clean"] | dict(join_lines=True))
    assert why is None and [line for line in cleaned.split("\n") if line] == CHAPTER
    assert clean_document(cleaned, config["clean"] | dict(join_lines=True)) == (cleaned, None)
    assert clean_document(text, config["clean"])[0].count("\n") > cleaned.count("\n")


def test_lists_tables_and_code_among_wrapped_lines_stay():
    prose = wrapped(PARAGRAPHS, 25, "", [""], False)
    rest = "1. 第一件事\n2. 第二件事\n| 甲 | 乙 |\n| 丙 | 丁 |\n```\nx\ny\n```"
    assert join_lines(f"{prose}\n{rest}") == "\n\n".join(PARAGRAPHS) + f"\n\n{rest}"


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(PARAGRAPHS),  # a line each already
        "关关雎鸠，在河之洲。\n窈窕淑女，君子好逑。\n" * 6,
        "春江潮水连海平，海上明月共潮生。滟滟随波千万里，何处春江无月明。\n江流宛转绕芳甸，月照花林皆似霰。空里流霜不觉飞，汀上白沙看不见。\n"
        * 4,  # of one width, but every line ends with its sentence
        "“你去哪里？”\n“回家。”\n“这么早？”\n“天快黑了，路上又不好走，我想早一点动身，免得家里人惦记。”\n" * 5,
        "姓名　　籍贯　　出生年月　　现任职务　　联系地址　　备注说明\n" * 8,
        "░░▀███░░░░▀██░░░░██▀░░░░██░░░░▀███░░░░▀██░░░░██▀\n" * 8,
        "",
        "一行",
    ],
)
def test_other_lines_stay(text):
    assert join_lines(text) == text


def test_real_texts_are_not_hard_wrapped(shared_data):
    novel = (shared_data / "pretrain" / "三国演义.txt").read_text(encoding="utf-8")
    assert join_lines(novel) == novel


def test_words_of_letters_keep_their_space():
    assert columns("中文ab") == 6
    lines = ["这一行有三十五个汉字那么宽可是没有写完它还要继续写下去直到这里为止 the end"] * 6
    assert join_lines("\n".join(lines[:5] + ["of it"])).endswith("the end of it")
