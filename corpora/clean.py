"""Pure text functions: repair a text, drop the junk lines of a document, judge it; hashes to split and compare by."""

import datetime
import functools
import hashlib
import html
import re
import unicodedata

import numpy as np

# Full-width letters and digits become ASCII, so that the year １９９８ shares its tokens with 1998.
# Full-width punctuation stays: it is how Chinese is typeset.
_HALF_WIDTH = {c: c - 0xFEE0 for a, z in ("０９", "ＡＺ", "ａｚ") for c in range(ord(a), ord(z) + 1)}
_REPEATED_SIGN = re.compile(r"([^\w\s])\1{6,}")


def normalise(text):
    """One line of text: no control, format or private-use characters, single spaces, half-width letters and
    digits, at most six equal signs in a row (as in ......)."""
    text = re.sub(r"\s+", " ", text)
    if not text.isprintable():
        text = "".join(c for c in text if c.isprintable())
    return _REPEATED_SIGN.sub(r"\1" * 6, text.translate(_HALF_WIDTH)).strip()


def content_key(text):
    """The letters and digits alone, lower case: equal for texts that differ in signs and spaces only."""
    return re.sub(r"[\W_]+", "", text).lower()


def text_hash(text, salt=""):
    """A 64-bit number that depends on (text, salt) alone: the same on every machine and in every run."""
    return int.from_bytes(
        hashlib.blake2b(f"{salt}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def char_ngrams(text, n):
    """A 64-bit hash of every run of n characters of the text: (len - n + 1,) uint64, the same on every machine."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    hashes = np.zeros(max(len(codes) - n + 1, 0), np.uint64)
    for i in range(n):  # a polynomial in an odd multiplier modulo 2**64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + len(hashes)]
    hashes ^= hashes >> np.uint64(32)  # the high bits are mixed, the low ones not yet
    return hashes * np.uint64(0xD6E8FEB86659FD93)


def is_validation(text, share):
    """Whether a document is for validation, by its content alone: adding documents moves none."""
    return text_hash(content_key(text), "split") < share * 2**64


# Cleaning. An option that is missing is off; so is a switch that is False, a minimum of 0 and a maximum of 1.0.
_INVISIBLE = (
    "\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # control characters
    "\xad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # zero width, direction, byte order
    "\ufdd0-\ufdef\ufe00-\ufe0f\ufff0-\uffff"  # no characters, variation selectors, U+FFFD for what was lost
    "\ud800-\uf8ff\U000e0000-\U0010ffff"  # unpaired surrogates, tags, private use
)
_LINE_BREAKS = "\r\v\f\x85\u2028\u2029"
_ODD_SPACES = "\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
_FULL_WIDTH = "０-９Ａ-Ｚａ-ｚ"
_SUSPECT = re.compile(f"[{_INVISIBLE}{_LINE_BREAKS}{_ODD_SPACES}{_FULL_WIDTH}\t<&]")
# Code in backticks is matched first and kept: there <br> and &lt; are what the text is about.
_HTML = re.compile(
    r"(?sia)(?P<code>```.*?(?:```|\Z)|`[^`\n]*`)|(?P<tag>\n?</?(?:br|p)(?:\s[^<>]{0,200}|/)?>\n?)"
    r"|&(?:amp;|#38;)*(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z]{2,8}\d{0,2});"
)


def repair(text):
    """Text as it was typed. Chinese punctuation, line breaks and the indentation of code stay."""
    padded = f"\n\n{text}\n\n"  # a line break at either end is one of three
    if not (_SUSPECT.search(text) or any(run in padded for run in ("  ", " \n", "\n\n\n"))):
        if unicodedata.is_normalized("NFC", text):
            return text  # most text: one look at each character
    text = re.sub(f"\r\n|[{_LINE_BREAKS}]", "\n", text)
    if "<" in text or "&" in text:
        text = _HTML.sub(_plain, text)
    text = unicodedata.normalize("NFC", re.sub(f"[{_INVISIBLE}]", "", text))
    text = re.sub(f"[{_FULL_WIDTH}]+", lambda run: run[0].translate(_HALF_WIDTH), text)
    if "\u3000" in text:  # the indent of a Chinese paragraph
        text = re.sub(r"(?m)^[^\S\n]*\u3000[^\S\n]*", "", text)
    text = re.sub(f"[{_ODD_SPACES}]", " ", text)
    text = re.sub(r" (?<=\S )[ \t]+|\t(?<=\S\t)[ \t]*", " ", text)  # not what indents a line
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _plain(match):
    """What a piece of HTML stands for."""
    if match["tag"] or match["code"]:
        return "\n" if match["tag"] else match[0]
    return html.unescape(re.sub("&(?:amp;|#38;)+", "&", match[0]))


_PERSONAL = re.compile(
    r"(?ai)(?P<email>(?<![\w.%+-])[\w.%+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8})"
    r"|(?<![\da-z])(?P<identity>[1-8]\d{5}(?:(?:18|19|20)\d{9}[\dx]|\d{9}))(?![\da-z])"
    r"|(?<!\d)(?<!\d\.)(?:(?:\+|00)?86[- ]?)?(?P<mobile>1[3-9]\d(?P<gap>[- ]?)\d{4}(?P=gap)\d{4})(?!\d)"
)


def mask_personal(text):
    """The text without e-mail addresses, Chinese identity numbers and mobile numbers."""
    likely = "@" in text or re.search(r"1[3-9]\d[- ]?\d{4}|\d{15}", text, re.ASCII)
    return _PERSONAL.sub(_masked, text) if likely else text


def _masked(match):
    """The name of what was matched in 【】, or the match itself where an identity number is none."""
    number = match["identity"]
    if number is None:
        return "【邮箱】" if match["email"] else "【手机号】"
    born = number[6:14] if len(number) == 18 else f"19{number[6:12]}"
    try:
        datetime.datetime.strptime(born, "%Y%m%d")
    except ValueError:
        return match[0]
    # GB 11643-1999 (ISO 7064, MOD 11-2): the last digit makes sum(digit * 2**place) = 1 modulo 11. X is ten.
    total = sum((10 if digit in "xX" else int(digit)) << (17 - i) for i, digit in enumerate(number))
    valid = len(number) == 15 or total % 11 == 1
    return "【身份证号】" if valid else match[0]


@functools.lru_cache(maxsize=1)
def _opencc():
    try:
        import opencc
    except ImportError as error:
        raise ImportError("to_simplified needs the package opencc (pip install opencc)") from error
    return opencc.OpenCC("t2s")


def clean_text(text, options):
    """The text after the transforms that options switch on: repair, to_simplified, mask_personal."""
    for _ in range(8):  # mending may uncover more to mend (&amp;lt;); what is nested deeper is no text
        before, text = text, _transform(text, options)
        if text == before:
            break
    return text


def _transform(text, options):
    if options.get("repair"):
        text = repair(text)
    if options.get("to_simplified"):
        text = _opencc().convert(text)
    return mask_personal(text) if options.get("mask_personal") else text


def clean_document(text, options):
    """(text, None), or (None, why it was dropped): clean_text, then junk lines, then the filters."""
    if text.count("\ufffd") > options.get("max_broken", 1.0) * len(text):
        return None, "broken characters"
    text = text.replace("\ufffd", "")
    for _ in range(8):
        text = clean_text(text, options)
        if options.get("repair"):  # spaces before a Chinese paragraph; code does not begin with Chinese
            text = re.sub("\n[ \t]+(?=[\u2010-\u2026\u3001-\u9fff\uff00-\uffef])", "\n", f"\n{text}")[1:]
        before, text = text, drop_junk(text) if options.get("web_junk") else text
        if text == before:
            break
    why = find_fault(text, options)
    return (None, why) if why else (text, None)


# Web novels and pages. A line is junk if it is one of these from end to end, but for signs around it. Prose that speaks
# of such things goes on in words where these end or have a sign (END).
_GO = "(?:到|上|登[录陆]|浏览|访问|关注|搜索)"
_SITE = r"[^，。！？!?]{,16}(?:网|阁|吧|站|屋|书城|文学|中文|小说|域名|[网地]址|起点|纵横|晋江|\.[a-z]{2,4}\b)"
_END = r"(?:[\W_a-z].*)?"
_JUNK = rf"""
.{{,12}}(?:最新|最快|正版|全本)(?:章节|更新|内容)+[，,]?[请就]{_GO}.*|欢迎广大书友.*
(?:.{{,8}}(?:网|阁|小说|章节))?(?:更新(?:速度)?最快|最快更新){_END}|最快更新.*最新章节{_END}
天才.{{1,2}}秒钟?就?[记記]住(?![了的]).*|[一1三3]秒钟?(?:轻松)?[记記]住{_SITE}{_END}
(?:敬?请|请大家|请务必)?(?:牢记|记住|谨记)(?:本[站书网]|我们).{{,6}}(?:域名|[网地]址|网站){_END}
(?:手机|电脑).{{,6}}请{_GO}[^，。]*(?:阅读|小说|看书|[a-z]\.[a-z].*){_END}
(?:如果)?(?:[您你]|大家)?喜欢.{{1,30}}(?:请|记得)(?:大家|各位|您)?收藏.*
请?(?:大家|各位|点击)?(?:收藏本[站书页]|(?:把本[站书])?(?:加入|添加)(?:书[签架]|收藏夹?)){_END}
(?:本[书文章]|小说)(?:[由在于]?{_SITE})?(?:独家)?首发(?:[于自在：:]{{,2}}{_SITE})?{_END}
[^，。由在于]{{2,8}}(?:网|阁|书城)(?:独家)?首发{_END}|首发(?:网址|域名|地址|网站)[：:]?.*
(?:《.+》|.{{,8}}小说)?\W*(?:无弹窗|无广告|全文阅读|最新章节)(?:最快更新|列表|广告|小说|全文|免费|阅读|请收藏本站|网|\W)*
(?:《.+》|.{{,10}}(?:小说|全[集本文]|免费|网))?\W*(?:txt|电子书)(?:电子书|小说|全[集本])*(?:免费)?下载{_END}
更多.{{,6}}(?:小说|电子书|好书|txt).{{,10}}(?:下载|尽在|请到|登[录陆]).*|.{{,6}}正在手打中.*|内容更新后.*刷新.*
(?:声明[：:])?(?:本站|本书|本电子书|所有小说).*(?:[网书]友上传|用户上传|整理制作|版权归|24小时内删除).*
(?:本[章节](?:完|结束|未完)|全章完){_END}|未完待续(?:\W+(?:如欲|欲知|请|敬请|更多).*)?
.{{,4}}这个?章节?后面还有.*下一页.*|请?点击?下一[页章](?:继续|阅读|观看)+{_END}|版权所有{_END}|.*ICP[备证]\W*\d.*
第?\d+\s?/\s?\d+页|第\d+页/共\d+页|[上下]一[章页]|返回(?:目录|顶部|首页|列表|书页)|章节报错|关闭窗口
(?:(?:[上下]一[章页篇]|(?:返回)?章?节?目录|返回(?:首页|顶部)|(?:返回)?(?:列表|书页)|[首末]页|加入书[签架]|投?推荐票|章节报错|打印|关闭|本页|窗口)[\W_]*){{2,}}
[上下]一篇[：:].*|(?:您的|当前)位置[：:].*|(?:责任|本文|网络)编辑[：:].{{1,10}}|点击(?:查看|阅读|展开)(?:更多|全文|原文|大图)
分享[到至][：:]?(?:(?:微信|微博|新浪|腾讯|QQ|空间|好友|朋友圈|人人|豆瓣|更多)\W*)*|(?:copyright|\(c\)|©)(?:copyright|c|\W)*\d.*
(?:扫一?扫|扫码|扫描|长按)[^，。]{{,6}}二维码，?(?:即可)?(?:关注|下载|添加|识别).{{,12}}
(?:更多.{{,10}})?(?:欢迎|敬?请)(?:大家)?关注.{{,8}}微信(?:公众)?(?:平台|号){_END}
"""
_JUNK = re.compile("|".join(_JUNK.split()), re.IGNORECASE)
_VOTES = "求个?(?:月票|推荐|收藏|订阅|打赏|鲜花|红票|票|点击|支持|评论|书评)"
# What may stand beside 求月票 in a line that asks for votes.
_BESIDE = re.compile(
    f"(?i){_VOTES}|月票|推荐票?|收藏|订阅|打赏|鲜花|红票|点击|支持|[谢感拜]谢|大家|各位|兄弟|姐妹|[书朋]友|读者|新书|上[传架]|期间?"
    "|第?[一二三四五六七八九十两0-9]+[更章]|[今明][日天晚]|更新?|送[到上]|继续|跪|再次|ps|作者|本书|小说|[的了们和跟啊吧哦]"
)
_SIGN = r"[=\-_*~—–－＝＊☆★◆◇●○□■▲△※#+＃～]"
_RULE = re.compile(rf"{_SIGN}\s*{_SIGN}\s*(?:{_SIGN}\s*)+")
_URL = r"(?:(?:https?|ftp)://|www[.．])[\w\-.．~:/?#@!$&'*+,;=%|]*"
_URL = re.compile(rf"(?ai)[ \t]*(?:[（(【\[<]{_URL}[)）】\]>]|{_URL}(?<![.．,;:!?*|'~]))")
_HINT = re.compile(
    "章节|上一|下一|本章|本节|全章|未完|最快|记住|記住|牢记|谨记|最新|收藏|书签|书架|首发|书友|弹窗|无广告|下载|全文|上传|版权|制作|正版|全本|手机|电脑"
    "|删除|手打|刷新|页|返回|关闭窗口|位置|opyright|OPYRIGHT|©|ICP|分享|编辑|点击|二维码|微信|求|://|www|WWW"
)


def is_junk(line):
    """Whether a line is nothing but an advert of its site, navigation, a cry for votes or a rule."""
    core = line.strip(" \t（()）【】[]『』<>←→*＊-—=~～☆★|｜。！!.…")
    rule = bool(_RULE.fullmatch(line.strip()))
    if rule or not core or core[0] in '“「"' or len(line) > 120:  # a rule; dots, speech, prose
        return rule
    if re.search(_VOTES, core):
        return len(content_key(_BESIDE.sub("", core))) <= max(1, len(core) // 8)
    return bool(_JUNK.fullmatch(core))


def drop_junk(text):
    """The text without junk lines, junk in brackets at the ends of lines, and URLs."""
    if not _HINT.search(text) and not _RULE.search(text):
        return text
    return "\n".join(line for line in map(_without_junk, text.split("\n")) if line is not None)


def _without_junk(line):
    """What is left of a line, or None if that is nothing."""
    if not _HINT.search(line) and not _RULE.match(line.lstrip()):
        return line
    if is_junk(line):
        return None
    aside = re.search(r"[ \t]*[（(【\[]([^（）()【】\[\]]{2,60})[）)】\]]$", line)
    if aside and is_junk(aside[1]):
        return line[: aside.start()]
    rest = _URL.sub("", line)
    keep = len(content_key(rest)) > 4  # more than the label of "官方网站：http://..."
    return line if rest == line else rest.strip() if keep else None


# Filters. The measures of repetition are Gopher's (arXiv:2112.11446, A1.1), in letters and digits instead of words.
NGRAM_WINDOW = 1 << 16  # characters judged together: a long novel may say again what it said long ago
NGRAM_SHORTEST = 100  # a shorter text is taken for one of this length: a name said three times is much of it


def repeated_line_share(text):
    """Share of the characters that stand in lines that occurred before."""
    lines = text.split("\n")
    total = sum(map(len, lines))
    return (total - sum(map(len, set(lines)))) / max(total, 1)


def top_ngram_share(text, n):
    """Share of the characters that the most frequent n-gram covers, its first time left out."""
    hashes = np.sort(char_ngrams(text, n))
    starts = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1], [True])))
    return min((int(np.diff(starts).max()) - 1) * n / max(len(text), NGRAM_SHORTEST), 1.0)


def repeated_ngram_share(text, n):
    """Share of the characters covered by n-grams that occurred before."""
    hashes = char_ngrams(text, n)
    in_order = np.sort(hashes)
    if not (in_order[1:] == in_order[:-1]).any():
        return 0.0  # most text
    again = np.delete(np.arange(len(hashes)), np.unique(hashes, return_index=True)[1])
    covered = np.zeros(len(text), bool)
    for i in range(n):
        covered[again + i] = True
    return float(covered.mean())


def _mean_share(measure, text, n):
    windows = [text[i : i + NGRAM_WINDOW] for i in range(0, len(text), NGRAM_WINDOW)]
    return sum(measure(window, n) * len(window) for window in windows) / len(text)


@functools.lru_cache(maxsize=1)
def _kinds_of_characters():
    """0, 1 for letters and digits, 2 for Chinese characters, by UTF-16 unit; the planes 2 and 3 are Chinese."""
    kinds = np.array([chr(code).isalnum() for code in range(1 << 16)], np.uint8)
    kinds[np.r_[0x3007, 0x3400:0x4DC0, 0x4E00:0xA000, 0xF900:0xFB00, 0xD840:0xD8C0]] = 2
    return kinds


def find_fault(text, options):
    """Why a document is no good Chinese text, or None: the first filter that it fails."""
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
    kinds = _kinds_of_characters()[units]
    _, others, chinese = np.bincount(kinds, minlength=3).tolist()
    if others + chinese < max(options.get("min_characters", 0), 1):
        return "too short"
    # UTF-8 read as GBK turns ，into 锛 and 。into 銆, which are in hardly any text, and U+FFFD into 锟斤拷.
    if sum(map(text.count, "锛銆锟")) > options.get("max_broken", 1.0) * len(text):
        return "broken characters"
    if chinese < options.get("min_chinese", 0) * (others + chinese):
        return "not Chinese enough"
    letters = units[kinds > 0].tobytes().decode("utf-16-le", "surrogatepass")  # dots and rules may repeat
    for why, key, share in (
        ("repeated lines", "max_repeated_lines", lambda: repeated_line_share(text)),
        ("repeated phrase", "max_top_ngram", lambda: _mean_share(top_ngram_share, letters, 4)),
        ("repeated n-grams", "max_repeated_ngrams", lambda: _mean_share(repeated_ngram_share, letters, 10)),
    ):
        if options.get(key, 1.0) < 1 and share() > options[key]:
            return why
