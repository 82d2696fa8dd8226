"""What a file of a corpus is: by its name when a folder is gone through, then by its first megabyte."""

import json
import re

from corpora.encodings import BLOCK, COMPRESSED, detect_encoding, escaped, open_bytes, reading
from corpora.fields import NUMBERS, nothing
from corpora.layouts import ANSWERS, INPUTS, INSTRUCTIONS, QUESTIONS, TEXTS, TURNS
from corpora.turns import role_of
from dataset.formats import DataError

TEXT_LAYOUTS = ("txt", "lines")  # whose files are plain text
TEXT_SUFFIXES = (".txt",)
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
METADATA = "dataset_infos.json dataset_info.json dataset_dict.json state.json configuration.json croissant.json".split()
PROSE = (".md", ".rst", ".markdown")  # text as such, notes beside rows
NOTES = "readme license licence copying notice changelog requirements _success".split()
ADVICE = {
    "unpack it": ".zip .tar .tgz .tbz2 .txz .7z .rar .lz4 .lzma .br",
    "finish its download": ".part .crdownload .aria2 .incomplete .download",
    "save it as .csv": ".xlsx .xls",
    "rename it to .txt": ".md .rst .markdown",
    "save it as .txt": ".doc .docx .pdf .epub .mobi .azw3 .rtf .html .htm",
}
FOREIGN = (  # first bytes of what is no corpus file
    (rb"PK\x03\x04", "a zip archive, .xlsx or .docx; unpack it, or save it as .csv or .txt"),
    (rb"7z\xbc\xaf|Rar!\x1a|.{257}ustar[\0 ]", "an archive; unpack it"),
    (b"|".join(magic.pattern for magic, _ in COMPRESSED), "compressed twice; decompress it once"),
    (rb"%PDF-\d|\xd0\xcf\x11\xe0|\{\\rtf", "a document of an office program; save it as .csv or .txt"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|ID3[\2-\4]|RIFF.{4}(WAVE|AVI |WEBP)", "a picture, sound or film"),
    (rb"SQLite format 3\0|\x89HDF|\x7fELF|\x80[\2-\5]", "neither text nor rows"),
)
LFS = b"version https://git-lfs.github.com/spec/"
# Fields of a row, in lower case. `data` is not among them: it may hold the turns of one, or all rows of a file.
CHATS = {name for name in TURNS if name != "data"}
ASKING = {name.lower() for name in (*INSTRUCTIONS, *QUESTIONS, *INPUTS)}
SPEAKING = CHATS | ASKING | {*TEXTS}
ANSWERED = {"chosen", "rejected", *map(str.lower, ANSWERS)} - {*TEXTS}
ROW_FIELDS = SPEAKING | ANSWERED | set("title paragraphs sections history".split())
# What a list of rows is called; one of another name beside a text or a question may be comments on it, or its sources.
LISTS = set(
    "data dataset datasets rows row items item records record samples sample examples entries list results train"
    " training test testing dev val valid validation eval corpus documents docs articles dialogs"
    " instances 数据 数据集 样本 训练 训练集 测试 测试集 验证 验证集 语料 列表 条目".split()
)
BLANKS = "\ufeff \t\r\n"

_COMPRESSION = re.compile(r"\.(gz|gzip|bz2|xz|zst|zstd)$")
_SUFFIX = re.compile(r"\.(7z|[a-z][a-z0-9]*)$")
_ARRAY = re.compile(r'\[\s*(?:[\]{\["]|\Z)')
_KEY = re.compile(r'\s*[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_ROWS = re.compile(r"\[\s*\{")
_TEXTS = re.compile(r'\[\s*"')


DECODER = json.JSONDecoder(strict=False, **NUMBERS)  # raw line breaks inside strings are common, and harmless


class Unread(DataError):
    """Why a file is not read: in a folder it is named and passed over."""


# by name


def suffixes(layout):
    return TEXT_SUFFIXES if layout in TEXT_LAYOUTS else ROW_SUFFIXES


def suffix_of(path):
    """The suffix without the compression's, in lower case; "" if there is none."""
    name = str(path).replace("\\", "/").rsplit("/", 1)[-1].lower()
    found = _SUFFIX.search(_COMPRESSION.sub("", name))
    return found.group() if found else ""


def check_name(path, layout):
    """Unread for a file of a folder that by its name is none of the corpus's; one without a suffix may be any."""
    name, suffix = str(path).replace("\\", "/").rsplit("/", 1)[-1].lower(), suffix_of(path)
    if name.endswith("~") or name.startswith("~$") or re.fullmatch("#.*#", name, re.DOTALL):
        raise Unread("a backup of an editor")
    notes = name.split(".")[0] in NOTES and suffix in ("", ".txt", *PROSE)
    if name in METADATA or notes or suffix in PROSE and layout not in TEXT_LAYOUTS:
        raise Unread("notes or metadata")
    if not suffix or suffix in suffixes(layout):
        return
    if suffix in ROW_SUFFIXES:
        raise Unread(f"rows, not text, which the layout {layout} reads")
    if suffix not in TEXT_SUFFIXES:  # those may hold JSON
        advice = next((f"; {what}" for what, those in ADVICE.items() if suffix in those.split()), "")
        raise Unread(f"a {suffix} file{advice}")


# by content


def look(path, layout, likely=None):
    """(kind, encoding, where the list of rows begins) of a file; `likely` is the encoding of one that is in doubt.

    Unread says why the layout does not read it, DataError what is wrong with it.
    """
    with reading(path), open_bytes(path) as stream:
        head = stream.read(BLOCK)
        if head.startswith(LFS):
            raise DataError(f"{escaped(path)}: a Git LFS pointer, the data was not downloaded: git lfs pull")
        for magic, what in FOREIGN:
            if re.match(magic, head, re.DOTALL):
                raise Unread(what)
        if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
            if layout in TEXT_LAYOUTS:
                raise Unread(f"rows, not text, which the layout {layout} reads")
            return "parquet" if head.startswith(b"PAR1") else "arrow", "", 0
        if suffix_of(path) in (".parquet", ".arrow"):
            raise DataError(f"{escaped(path)}: does not begin as such a file does: damaged or not fully downloaded")
        encoding = detect_encoding(path, stream, head, likely)
    text = head.decode(encoding, "tiny_llama2_mark").lstrip(BLANKS)
    try:
        kind, start = text_kind(text, len(head) < BLOCK, layout, suffix_of(path))
    except Unread:
        raise
    except DataError as error:
        raise DataError(f"{escaped(path)}: {error}") from None
    return kind, encoding, start


def text_kind(text, whole, layout, suffix):
    """(kind, where the list of rows begins) of text, which is the whole file or its beginning."""
    if layout in TEXT_LAYOUTS:
        if isinstance(decode_json(text.split("\n", 1)[0]), dict):
            raise Unread(f"JSON, not text, which the layout {layout} reads; a layout such as text_rows reads it")
        if layout == "lines":
            check_breaks(text)
        return "text" if layout == "txt" else "lines", 0
    if not text:
        raise Unread("blank")
    if text[0] in "{[" and (found := json_kind(text, whole)):
        return found
    if suffix in (".csv", ".tsv"):
        return "csv", 0
    kinds = (dict, str) if suffix in ROW_SUFFIXES else dict
    if any(isinstance(decode_json(line), kinds) for line in text.split("\n")):
        return "lines", 0
    if suffix in ROW_SUFFIXES:
        raise DataError("neither a JSON array nor JSON Lines")
    if layout != "prompts":
        raise Unread("plain text, not rows; the layouts txt and lines read it")
    if suffix not in TEXT_SUFFIXES:
        raise Unread("plain text, not rows; prompts, one a line, are read from .txt")
    check_breaks(text)
    return "plain", 0


def check_breaks(text):
    r"""DataError for text whose lines end in \r alone, as old Macs wrote them: it would be one line."""
    if "\r" in text.strip("\r") and "\n" not in text:
        raise DataError(r"its lines end in \r alone; make it \n: tr '\r' '\n' < FILE > NEW")


def decode_json(text):
    """The JSON value that the text is, None if it is none."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def is_conversation(value):
    """Whether a row is the list of the messages itself."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value):
    if not isinstance(value, dict) or not {"content", "value", "text"} & value.keys():
        return False
    role = value.get("role", value.get("from"))
    return isinstance(role, str) and role_of(role) is not None


def json_kind(text, whole):
    """("lines", 0), or ("json", start) of values that are not a line each; "value" if it is one row.

    None of what only begins like JSON.
    """
    first, _, rest = text.partition("\n")
    if text[0] == "[":
        first, second = map(decode_json, (first, rest.partition("\n")[0]))
        if is_conversation(first) or isinstance(first, list) and is_conversation(second):
            return "lines", 0
        if whole and is_conversation(decode_json(text)):
            return "value", 0
        return ("json", 0) if _ARRAY.match(text) else None
    if isinstance(decode_json(first), dict):
        start = 0 if rest.strip(BLANKS) else find_rows(text)
        return "json" if start else "lines", start
    if not whole and "\n" not in text:
        start = find_rows(text)
        return "json" if start else "lines", start
    try:
        after = text[DECODER.raw_decode(text)[1] :].lstrip(BLANKS)
    except (ValueError, RecursionError):
        broken = any(line[:1] == "{" and decode_json(line) for line in rest.split("\n"))  # a line that others follow
        return ("lines", 0) if broken else ("json", find_rows(text))
    if after and after[0] not in ",{":
        return "lines", 0
    return "json", 0 if after else find_rows(text)


CUT = object()  # the value of a field that goes on after the beginning of a file


def members(text, at):
    """(name, where its value begins, the value or CUT) of each field of the object that stands there in a text."""
    while match := _KEY.match(text, at):
        start = match.end()
        try:
            value, at = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            value = CUT
        yield str(decode_json(match[1])), start, value
        if value is CUT:
            return


def find_rows(text):
    """Where in the text of an object, or its beginning, the list of objects stands that are the rows; 0 if in none."""
    if is_table(text):
        raise DataError(
            "rows by number or columns, as pandas' to_json and to_dict of datasets write them; write a row a line: "
            "to_json(path, orient='records', lines=True, force_ascii=False)"
        )
    found, others = {}, {}
    for key, at, value in members(text, 0):
        if match := _ROWS.match(text, at):
            first = {name.lower(): inner for name, _, inner in members(text, match.end() - 1)}
            if not may_be_rows(key.lower(), first):
                return 0
            found[key] = at, first
        else:
            others[key] = value
    found = {key: at for key, (at, first) in found.items() if not is_row(others, key, first)}
    if len(found) > 1:
        raise DataError(f"holds several lists, {', '.join(map(escaped, found))}; write each to a file of its own")
    return next(iter(found.values()), 0)


def is_table(text):
    """Whether the object that a text, or its beginning, holds is a table turned to columns or to rows by number.

    {"0": {...}, "1": ...}, {"question": {"0": ...}, ...}, {"question": [...], "answer": [...]} and {"columns": [...],
    "data": [[...], ...]}: none of these is a row.
    """
    fields = {key: (at, value) for key, at, value in members(text, 0)}
    opened = {text[at] for at, _ in fields.values()}
    if opened == {"{"}:  # the first name in each
        inner = {next(members(text, at), ("",))[0] for at, _ in fields.values()}
        return all(re.fullmatch(r"\d+", key) for key in fields) or inner == {"0"}
    if opened != {"["} or len(fields) + any(value is CUT for _, value in fields.values()) < 2:
        return False
    if {"columns", "data"} <= fields.keys() <= {"columns", "data", "index"}:
        return True
    lengths = {len(value) for _, value in fields.values() if value is not CUT} or {2}
    held = {key.lower() for key, (at, _) in fields.items() if _TEXTS.match(text, at)}
    return bool(held & ({*TEXTS} | ASKING | ANSWERED)) and len(lengths) == 1 and max(lengths) > 1


def may_be_rows(key, first):
    """Whether a list of this name that begins with this object may be rows, rather than a field of a row."""
    if key in ROW_FIELDS:  # {"dialogues": [{"messages": [...]}, ...]}
        return key in CHATS and any(value is CUT or isinstance(value, (list, dict)) for value in chats_of(first))
    return not (key == "data" and is_message(first))


def chats_of(fields):
    return [value for name, value in fields.items() if name in CHATS]


def is_row(others, key, first):
    """Whether an object is a row itself: by what it holds beside a list of this name that begins with this object."""
    filled = {name.lower() for name, value in others.items() if value is CUT or not nothing(value)}
    names = ROW_FIELDS & {name.lower() for name in first}
    if not names:
        return any(name.lower() in ROW_FIELDS for name in others)
    if names <= {"input", "output"} and key != "data" or filled & ANSWERED and not names & ANSWERED:
        return bool(filled & SPEAKING)  # what a program is tested with, or what an answer is about
    whole = names & CHATS or names & ANSWERED and names & ASKING  # where a question alone stands beside them
    rows = key.lower() in LISTS or whole and not filled & (SPEAKING - ASKING | ANSWERED)
    return bool(filled & SPEAKING) and not rows
