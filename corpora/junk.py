"""Junk lines of scraped documents: adverts of a site, its navigation, cries for votes, rules, URLs."""

import operator
import re

from corpora.fences import CODE

# Web novels, online editions of classics and pages. A line is junk if it is one of these from end to end, but for signs
# around it. Prose that speaks of such things goes on in words where these end or have a sign (END).
_GO = "(?:到|上|登[录陆]|浏览|访问|关注|搜索)"
_SITE = r"[^，。！？!?]{,16}(?:网|阁|吧|站|屋|书城|文学|中文|小说|域名|[网地]址|起点|纵横|晋江|\.[a-z]{2,4}\b)"
_END = r"(?:[\W_a-z].*)?"
_NET = r"[^，。！？!?《》]{,16}(?:网站?|书城|起点|纵横|晋江|[a-z\d]\.[a-z]{2,4}\b)"
_FIRST = r"(?:\W*(?:请勿|(?:更新)?最快|第一时间|请?支持正版|正版|[a-z]).*)?"  # behind 首发
_NUMBER = r"[〇零一二三四五六七八九十百千两\d]+"
_TURN = "[上下前后]一[章页篇回节卷]"
_BACK = r"(?:返回到?|回到?)(?:本书|《[^》]{1,16}》)?的?(?:目录|书目|首页|页首|顶部|列表|书页|封面|上页)页?"
_EDITION = "(?:(?:手机|电脑|触屏|wap)(?:版|站))"
# What leads on to another page, and what may stand beside it; the latter alone may be headings (打印列表, 手机版).
_STEP = rf"{_TURN}|{_BACK}|[上下前后][章页回]|加入书[签架]|投推荐票|章节报错"
_PLACE = (
    rf"(?:第\d+页|共\d+页|章?节?目录|列表|书[页架首]|封面|[首末尾主]页|推荐票|{_EDITION}"
    "|打印(?:本页)?|关闭(?:本页|窗口)?|本页|窗口)"
)
_KEY = re.compile(f"(?:{_STEP}|{_PLACE}|[\\W_])+")  # in brackets behind a word: PgDn（下一页）
_BETWEEN = r"[\s|｜/>＞»›·•\-_\[\]【】()（）<«‹←→]+"
_EASE = "(?:[，,]?\\s?(?:方便|以便|便于|以备|下次).{,12})?[\\W_a-z]*"
_NAME = r"(?:[\s：:（(“「【][^，。！？]{,20}|[\W_a-z\d]*)"  # of an account
_SHARED = "(?:微信|微博|新浪|腾讯|QQ|空间|好友|朋友圈|人人|豆瓣|更多)+"
# A site's licence, with its owner before it and more of a footer behind it.
_LICENCE = (
    r"(?:(?:网站|本站)?(?:ICP)?(?:备案|许可证)(?:编?号|序号)?[：:]\s*)?"
    r"[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼]?ICP[备证]\W?\d{4,}\s?号?(?:-\d+)?"
)
_OWNER = r"(?:[^，。！？；：]{,40}(?:版权所有|reserved\.?|有限公司|集团|网站?|本站|©)[\s|｜]+)"
_FOOTER = (
    "(?:.?公网安备|增值电信|[^，。]{,12}许可证|技术支持|版权所有|copyright|©|电话|地址|联系|站长|all\\srights|ICP)"
)
_RIGHTS = (
    "(?:[侵翻盗违].{,6}必究|(?:未经|不得|请勿|禁止|严禁|保留|转载|仿冒)[^？]*"
    r"|[a-z\d].*|[^，。：:]{,20}(?:网站?|公司|集团|出版社))"
)
_CREDIT = "(?:扫描|扫校|录入|[一二三初]校|校对|ocr|排版|图源)(?:[及和、/]?(?:扫描|录入|校对|整理|排版))?[：:]"
# The hundred most frequent surnames, and those of two characters: what begins otherwise may be no name.
_SURNAME = (
    "(?:[王李张刘陈杨黄赵吴周徐孙马朱胡郭何林罗高郑梁谢宋唐许韩邓冯曹彭曾肖萧田董潘袁蔡蒋余于杜叶程魏苏吕丁任卢姚"
    "沈钟姜崔谭陆范汪廖石金韦贾夏付傅方邹熊白孟秦邱侯江尹薛闫段雷龙黎史陶贺毛郝顾龚邵万覃武钱戴严莫孔向常汤]"
    "|欧阳|司马|上官|诸葛|夏侯|东方|皇甫|尉迟|公孙|慕容|令狐|司徒)"
)
_PERSON = rf"{_SURNAME}\s?[\u4e00-\u9fff]{{1,2}}"
# Who put an old book online: a site. Of a person or a committee, prose says so too.
_LIBRARY = "(?:书[库屋城吧]|(?:公益|在线|网上|电子|网络)图书馆)"
_MAKER = rf"[^，。：:！？]{{,16}}(?:网友?|论坛|文学城|{_LIBRARY}|[a-z\d]\.[a-z]{{2,4}})[^，。：:！？\w]*"
_MADE = r"(?:(?:ocr|扫描|扫校|录入|输入|校对|整理|制作|收集|提供|发布|上传|下载)[、，及并和/\s]?)+"
_JUNK = rf"""
.{{,12}}(?:最新|最快|正版|全本)章节(?:更新|内容)*[，,]?[请就]{_GO}.*|欢迎广大书友光临阅读.*
(?:.{{,8}}(?:网|阁|小说|章节))?(?:更新(?:速度)?最快|最快更新)(?:\W*(?:请|无弹窗|无广告|最新章节|[a-z\d]).*)?|最快更新.*最新章节{_END}
天才.{{1,2}}秒钟?就?[记記]住(?:(?:本[站书网]|\W*[【『《\[：:a-z]).*|{_SITE}{_END})|[一1三3]秒钟?(?:轻松)?[记記]住(?!.?[个这那几些哪]){_SITE}{_END}
(?:敬?请|请大家|请务必)?(?:牢记|记住|谨记)(?:本[站书网].{{,6}}(?:[网地]址|域名|网站)|我们.{{,6}}(?:网址|域名)){_END}
(?:手机|电脑).{{,6}}请{_GO}[^，。\u4e00-\u9fff]*[a-z\d]\.[a-z]{{2,}}[^，。\u4e00-\u9fff]*(?:(?:阅读|看书|看小说){_END})?
(?:如果)?(?:[您你]|大家)?喜欢(?:本[书文站]|这[本部](?:书|小说)|《[^》]+》).{{,8}}(?:请|记得)(?:大家|各位|您)?收藏(?:本[站书页])?{_END}
(?:如果)?(?:[您你]|大家)?喜欢.{{1,30}}(?:请|记得)(?:大家|各位|您)?收藏(?:本[站页]{_END}|[：:]?\W*[a-z\d\-]+\.[a-z\d].*)
请?(?:大家|各位|点击)?(?:收藏本[站书页]|(?:把本[站书])?加入(?:书[签架]|收藏夹?)|把本[站书]添加到?(?:书[签架]|收藏夹?)){_EASE}
(?:本[书文章]|小说)(?:[由在于]?{_NET})?(?:独家)?首发(?:[于自在：:]{{,2}}{_NET})?{_FIRST}
[^，。由在于]{{2,8}}(?:(?<!全)网|书城)(?:独家)?首发{_FIRST}|首发(?:网址|域名|地址|网站)[：:\s]*(?:https?:|[a-z\d\-]+\.[a-z]).*
(?:《.+》|.{{,8}}小说)?\W*(?:无弹窗|无广告|全文阅读|最新章节)(?:最快更新|列表|广告|小说|全文|免费|阅读|请收藏本站|网|\W)*
(?:《.+》|.{{,10}}(?:小说|全[集本文]|免费|网))?\W*(?:txt|电子书)(?:电子书|小说|全[集本])*(?:免费)?下载(?:\W*(?:尽在.*|[a-z\d./:\s\-]*))
更多.{{,6}}(?:小说|电子书|好书|txt)(?:尽在.*|.{{,10}}(?:下载|请到|登[录陆]).*[a-z\d]\.[a-z].*)
(?:.{{,4}}章节?|小说|更新)?正在手打中(?:\W*请稍.*)?|(?:内容)?更新后\W*请?(?:重新)?刷新(?:本?页面?|本页|网页)\W*即可获取最新(?:更新|章节|内容)
(?:声明[：:])?本站.*(?:[网书]友上传|用户上传|整理制作|版权归|24小时内删除).*
(?:声明[：:])?(?:本书|本电子书|所有小说)(?:[均都]?[由为是系](?:[网书]友|用户)上传{_END}|.*请[^，。]{{,8}}24小时之?内(?:自行)?删除)
(?:本[章节回](?:完|结束|未完)|全章完)(?:\W+(?:敬?请)?(?:点击|期待|收藏|未完待续|下一[页章]$).*)?|未完待续(?:\W+(?:如欲|欲知|请|敬请|更多).*)?
.{{,4}}这个?章节?后面还有.*下一页.*|请?点击?下一[页章](?:继续|阅读|观看)+{_END}|版权所有(?:\W+{_RIGHTS}){{,2}}|{_OWNER}?{_LICENCE}(?:[\s|｜]+(?:{_LICENCE}|{_FOOTER}).*)?
第?\d+\s?/\s?\d+页|第\d+页/共\d+页|{_TURN}|{_BACK}|章节(?:报错|目录|列表)
(?:《[^》]+》\W*)?(?=.*(?:{_STEP}))(?:(?:{_STEP}|{_PLACE}|第\d+[章回])[\W_]*){{2,}}|{_PLACE}(?:{_BETWEEN}{_PLACE})+
[首主]页(?:\s*[>＞»›]+[^，。！？>＞»›]{{1,16}})+|{_TURN}[：:]\s*(?:(?:暂无|没有(?:了|[更其]?[多他]?文章))|第{_NUMBER}[章回节卷]\s[^，。！？]{{,30}})|{_EDITION}\W*(?:阅读)?(?:网址|地址)?(?:[：:]\s*|\s*(?=https?:|www\.|m\.|wap\.))[a-z\d./:\-]+\.[a-z]{{2,}}[a-z\d./\-?=&]*
第{_NUMBER}[章回节卷]\s*[（(]?(?:完|终|结束)|欢迎[您你]?(?:访问|光临)[^，。！？]{{,16}}(?:网站?|本站|论坛|[a-z\d]\.[a-z]{{2,4}})
(?-i:Powered\s?[Bb]y\s?[A-Z]).{{,30}}|powered\s?by\s?(?:discuz|phpwind|wordpress|dedecms|php).{{,30}}
(?:(?:字数|人气|点击(?:[数率]|次数)?|(?:阅读|浏览)(?:次数|[数量])|(?:更新|发布|上传)(?:时间|日期))[：:]\s*[\d年月日:\-/.\s]*\d[\d年月日次字万:\-/.\s]*[\W_]*)+
(?:(?:请|您|大家|可以?|按|使用|快捷键|键盘|同时)\W*)*ctrl\W*d\W*(?:快捷|组合)?键?\W*(?:(?:即|便)?可以?|来|进行)?(?:快速)?(?:(?:加入|添加到?|收藏)(?:本[站书页]|到?收藏夹|到?书签)?)*(?:[，,]?(?:方便|以便|便于)[^，。]{{,10}})?
{_CREDIT}\s*{_PERSON}|ocr[：:](?!.*识别)\s*(?:[\u4e00-\u9fff·]{{2,4}}|[a-z\d_.@\-]{{2,24}})
(?:{_CREDIT}\s*(?:[\u4e00-\u9fff·]{{2,4}}|[\d_.@\-]*[a-z][a-z\d_.@\-]{{1,24}})[\W_]*){{2,}}
本(?:书|文|作品|电子书|txt)(?:电子版)?由{_MAKER}{_MADE}|[^，。：:！？由]{{2,10}}{_LIBRARY}(?:\W*(?:ocr|扫|校对|录入)|\W+整理)(?:{_MADE}|校)?
(?:您的|当前)位置[：:](?:[^，。！？>＞»›]{{,8}}[首主]页\s*(?:[>＞»›→/\-].*)?|[^，。！？>＞»›]+(?:[>＞»›]+[^，。！？>＞»›]+){{2,}})
(?:责任|本文|网络)编辑[：:]\s*(?:{_PERSON}[\W_]*){{1,3}}|点击(?:查看|阅读|展开)(?:更多|全文|原文|大图)
分享[到至](?:[：:]\s*(?:{_SHARED}\W*)*|\s*{_SHARED}(?:\W+{_SHARED})+)?|(?:copyright|\(c\)|©)(?:copyright|c|\W)*\d.*
(?:扫一?扫|扫码|扫描|长按)(?:识别)?[^，。]{{,6}}二维码，?(?:即可)?(?:关注(?:我们|本[站报刊号])?|(?:关注|添加)[^，。]{{,8}}(?:公众|微信|服务|订阅)号?|下载(?:[^，。]{{,6}}(?:客户端|app))?|添加好友){_NAME}
(?:更多.{{,10}})?(?:欢迎|敬?请)(?:大家)?关注.{{,8}}微信(?:公众)?(?:平台|号){_NAME}
"""
_JUNK = re.compile("|".join(_JUNK.split()), re.IGNORECASE)
_ONE_WORD = "[寻请需要征追谋力诉供讲探祈央恳乞哀苛渴索强企吁务欲所不]"  # with 求: 寻求支持, 需求评论 are no cries
_VOTES = f"求个?(?:月票|推荐票|红票)|(?<!{_ONE_WORD})求个?(?:推荐|收藏|订阅|打赏|鲜花|票|点击|支持|评论|书评)"
# What may stand beside 求月票 in a line that asks for votes.
_BESIDE = re.compile(
    f"(?i){_VOTES}|月票|推荐票?|收藏|订阅|打赏|鲜花|红票|点击|支持|[谢感拜]谢|大家|各位|兄弟|姐妹|[书朋]友|读者|新书|上[传架]|期间?"
    "|第?[一二三四五六七八九十两0-9]+[更章]|[今明][日天晚]|更新?|送[到上]|继续|跪|再次|ps|作者|本书|小说|[的了们和跟啊吧哦]"
)
_SIGN = r"[=\-_*~—–－＝＊☆★◆◇●○□■▲△※#+＃～]"
_RULE = re.compile(rf"{_SIGN}\s*{_SIGN}\s*(?:{_SIGN}\s*)+")
_STARS = re.compile("[★●][★☆●○]{2,4}")  # as many as people give
_URL = r"(?:(?:https?|ftp)://|www[.．])[\w\-.．~:/?#@!$&'*+,;=%|]*"
_AFTER = r"(?:^[\s*•·\-]*|(?<=[。！？!?…”])\s*)"
# One that a sentence goes on behind is part of it; in brackets, or alone or with a label at the end, none is.
_URL = re.compile(
    rf"(?ai)(?<![ \t])[ \t]*[（(【\[<]{_URL}[)）】\]>]|{_AFTER}{_URL}(?:\s+{_URL})*\s*$"
    rf"|{_AFTER}[^，。！？!?；：:\n]{{,12}}[：:][ \t]*{_URL}[。\s]*$"
)
_HINT = re.compile(  # every one begins with a character, by which re finds them fast
    "章节|上一|下一|本章|本节|全章|未完|最快|记住|記住|牢记|谨记|最新|收藏|书签|书架|首发|书友|弹窗|无广告|下载|全文|上传|版权|制作|正版|全本|手机|电脑"
    "|删除|手打|刷新|页|返回|关闭窗口|位置|opyright|OPYRIGHT|©|ICP|分享|编辑|点击|二维码|微信|求|://|www|WWW|上回|下回|前一[章回页]|后一[章回页]"
    r"|目录|书目|列表|顶部|封面|完[）)】]*\s*(?:\n|$)|终[）)】]*\s*(?:\n|$)|结束[）)】]*\s*(?:\n|$)|触屏|扫[描校]|校[对：:]|录入|整理"
    "|图源|数[：:]|气[：:]|间[：:]|期[：:]|欢迎[您你访光]|wap|WAP|trl|TRL|ocr|OCR|owered|OWERED"
)


def _letters(text):
    return sum(map(str.isalnum, text))


def is_junk(line):
    """Whether a line is nothing but an advert of its site, navigation, a cry for votes or a rule."""
    core = line.strip(" \t（()）【】[]『』<>←→*＊-—=~～☆★|｜。！!.…")
    rule = bool(_RULE.fullmatch(line.strip())) and not _STARS.fullmatch(line.strip())
    if rule or not core or core[0] in '“「"' or len(line) > 120:  # a rule; dots, speech, prose
        return rule
    if re.search(_VOTES, core):
        return _letters(_BESIDE.sub("", core)) <= max(1, len(core) // 8)
    return bool(_JUNK.fullmatch(core))


def drop_junk(text, notes=None):
    """The text without junk lines, junk in brackets at the ends of lines, and URLs; `notes` gets one for each line."""
    if not _HINT.search(text) and not _RULE.search(text):
        return text
    lines = text.split("\n")
    rest = list(map(_without_junk, lines))
    if notes is not None:
        notes += ["junk lines removed"] * sum(map(operator.ne, lines, rest))
    return "\n".join(line for line in rest if line is not None)


def _without_junk(line):
    """What is left of a line, or None if that is nothing."""
    if CODE in line or not _HINT.search(line) and not _RULE.match(line.lstrip()):
        return line
    if is_junk(line):
        return None
    aside = re.search(r"[ \t]*[（(【\[]([^（）()【】\[\]]{2,60})[）)】\]]$", line)
    if aside and is_junk(aside[1]) and not _KEY.fullmatch(aside[1]):
        return line[: aside.start()]
    rest = _URL.sub("", line)
    return line if rest == line else rest.strip() or None
