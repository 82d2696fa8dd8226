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
        # phrases with single spaces between them; couplets that end with a comma
        "春眠不觉晓 处处闻啼鸟 夜来风雨声 花落知多少\n白日依山尽 黄河入海流 欲穷千里目 更上一层楼\n" * 3,
        "汉皇重色思倾国，御宇多年求不得，\n杨家有女初长成，养在深闺人未识，\n" * 4,
        "汉皇重色思倾国，御宇多年求不得，杨家有女初长成\n养在深闺人未识，天生丽质难自弃，一朝选在君王侧\n" * 4,
        "张三：今天的天气真不错，我们一起到公园里去走一走吧\n李四：好的。你等我一会儿，我把手头的这些事情先做完了\n"
        * 5,
        "“今天的天气真不错。我们一起到公园里去走一走吧，好\n“你等我一会儿，我把手头的这些事情先做完。然后再走\n" * 5,
        "北京大学图书馆 海淀区颐和园路五号 周一至周日开放\n清华大学图书馆 海淀区清华园一号楼 周一至周五开放\n"
        "首都博物馆 西城区复兴门外大街十六号 周二至周日开\n中国美术馆 东城区五四大街一号 周二至周日九点到五点\n"
        "国家大剧院 西城区西长安街二号 周二至周日全天可以\n北京动物园 西城区西直门外大街一百三十七号 每天开\n",
        "答卷的时候请不要说话。交卷以后请马上离开考场，谢谢\n答卷以前请写好姓名，并检查试题的页数。缺页请举手说\n" * 4,
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
    text = wrapped(PARAGRAPHS, 25, "", [""], False)
    line = "这一行。有二十五个汉字那么宽，还没有写完 the end"
    assert join_lines(f"{text}\n{line}\nof it").endswith("the end of it")


@pytest.mark.parametrize("width", [19, 20, 30, 35, 38, 40, 76])
@pytest.mark.parametrize("hang", [False, True])
def test_a_novel_is_joined_at_every_width(shared_data, width, hang):
    novel = (shared_data / "pretrain" / "三国演义.txt").read_text(encoding="utf-8")
    paragraphs = [
        line.strip() for line in novel.split("\n")[:300] if line.strip() and not line.strip().startswith("第")
    ]
    assert join_lines(wrapped(paragraphs, width, "\u3000\u3000", [], hang)) == "\n".join(
        "\u3000\u3000" + paragraph for paragraph in paragraphs
    )
