"""Bytes of a file -> text: what it is compressed with and encoded in is told by what it holds, not by its name."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import zlib
from contextlib import contextmanager

from dataset.formats import DataError, escaped

LEGACY = {"gb18030": "GB18030", "big5hkscs": "Big5"}
WIDE = {f"utf-{n}{end}": f"UTF-{n}" for n in (16, 32) for end in ("", "-le", "-be")}  # no byte ends a line
ENCODINGS = {"utf-8": "UTF-8"} | LEGACY | WIDE
BLOCK = 1 << 20  # what is read at once: bytes, or characters of a JSON array
LONGEST = 1 << 25  # bytes or characters of a line or record: a novel of ten million characters is one
PLACES = 16  # pieces of a large file that its encoding is told from, besides its first megabyte

# The characters that make up half of any Chinese text, simplified or traditional; their bytes in one encoding are rare
# characters in the others.
COMMON = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行"
    "所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力"
    "它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应向头文体政美相见被利什二等产新己"
    "这個們來為國說時會對於過發後裡種經麼學現當沒動還進樣開從實軍無與長機關點業將兩間問應頭體見產曰矣乎此言何"
    "，。、：；！？“”《》（）「」…—　"
)


class Doubtful(DataError):
    """The encoding of a file cannot be told from what it holds."""


def open_zstd(path, mode="rb"):
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{escaped(path)}: reading .zst files needs pyarrow (pip install pyarrow)") from None
    return io.BufferedReader(pyarrow.input_stream(open(path, mode), compression="zstd"))


COMPRESSED = (
    (re.compile(rb"\x1f\x8b\x08"), gzip.open),
    (re.compile(rb"BZh[1-9][1\x17]"), bz2.open),
    (re.compile(rb"\xfd7zXZ\0"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd"), open_zstd),
)


def open_bytes(path):
    """The content of a file, decompressed."""
    file = open(path, "rb")
    opener = next((opener for magic, opener in COMPRESSED if magic.match(file.peek(8))), None)
    if opener is None:
        return file
    file.close()
    return opener(path, "rb")


def is_compressed(path):
    with open(path, "rb") as file:
        return any(magic.match(file.peek(8)) for magic, _ in COMPRESSED)


# A lone surrogate for what does not decode, which `is_clean` finds ("surrogateescape" fails on some GB18030).
codecs.register_error("tiny_llama2_mark", lambda error: ("\udcff", error.end))


# Python decodes GB18030 as of 2000, which kept these for private use; GB 18030-2022 has characters of Unicode there.
_GB18030 = str.maketrans(  # the codes A6D9 to A6F3 (vertical punctuation), A8BC, FE51 to FEA0 (parts of characters)
    "\ue78d\ue78e\ue78f\ue790\ue791\ue792\ue793\ue794\ue795\ue796\ue7c7"
    "\ue816\ue817\ue818\ue81e\ue826\ue82b\ue82c\ue831\ue832\ue83b\ue843\ue854\ue855\ue864",
    "\ufe10\ufe12\ufe11\ufe13\ufe14\ufe15\ufe16\ufe17\ufe18\ufe19\u1e3f"
    "\U00020087\U00020089\U000200cc\u9fb4\u9fb5\u9fb6\u9fb7\U000215d7\u9fb8\U0002298f\u9fb9\u9fba\U000241fe\u9fbb",
)
_PRIVATE = re.compile("[\ue78d-\ue864]")


def standard(text):
    """Text that Python decoded from GB18030, with the characters of GB 18030-2022."""
    return text.translate(_GB18030) if _PRIVATE.search(text) else text


def decode(line, encoding):
    text = line.decode(encoding)
    return standard(text) if encoding == "gb18030" else text


class _Decoder(codecs.getincrementaldecoder("gb18030")):
    def decode(self, data, final=False):
        return standard(super().decode(data, final))


def _codec(name):
    """Python's codec of GB18030 with our decoder, by the name that open_text calls it; None for other names."""
    old = codecs.lookup("gb18030")
    ours = codecs.CodecInfo(old.encode, old.decode, old.streamreader, old.streamwriter, None, _Decoder, name)
    return ours if name == CODECS["gb18030"] else None


CODECS = {"utf-8": "utf-8-sig", "gb18030": "tiny_llama2_gb18030"}
codecs.register(_codec)


def open_text(path, encoding, newline=""):
    """Decoded text; line breaks are kept, and bytes that do not decode marked."""
    return io.TextIOWrapper(open_bytes(path), CODECS.get(encoding, encoding), "tiny_llama2_mark", newline)


def lines_of(file):
    """(line, its length) of all lines of bytes or text; None for one of LONGEST or more, which is not held."""
    while line := file.readline(LONGEST):
        size, end = len(line), line[-1:]
        while size >= LONGEST and end not in (b"\n", "\n", b"", ""):
            line, more = None, file.readline(BLOCK)
            size, end = size + len(more), more[-1:]
        yield line, size


def is_clean(text):
    """Whether all of the text did decode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def reading(path):
    """DataError that names the file for whatever stops its reading."""
    try:
        yield
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{escaped(error.filename or path)}: cannot be read: {error.strerror}") from None
        raise DataError(f"{escaped(path)}: damaged or not fully downloaded: {error}") from None


def detect_encoding(path, stream, head, likely=None):
    """A key of ENCODINGS, by the byte order mark, what decodes and which characters come of it.

    `stream` is an open file that `head` was read from. Nearly all Big5 decodes as GB18030, so that these two are told
    by how frequent the characters are which they give; where that is in doubt, it is the `likely` one if that decodes.
    Doubtful if no encoding is clearly right.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for name in ("utf-32-le", "utf-32-be"):  # of other bytes hardly four are a character
        if b"\0" in head and can_decode(head, name) and wide_score(head, name) > 0.1:
            return name
    if b"\0" in head and (wide := clearly_best({name: wide_score(head, name) for name in ("utf-16-le", "utf-16-be")})):
        return wide
    lines = sample_lines(stream, head)
    if sum(can_decode(line, "utf-8") for line in lines) >= 0.5 * len(lines):
        return "utf-8"
    scores = {name: score(lines, name) for name in LEGACY}
    if best := clearly_best(scores):
        return best
    if scores.get(likely, 0) == max(scores.values()) > 0:
        return likely
    raise Doubtful(
        f"{escaped(path)}: neither UTF-8 nor GB18030 nor Big5 beyond doubt; convert it: iconv -f ENCODING -t UTF-8"
    )


def sample_lines(stream, head):
    """Lines that are not ASCII, of the head and of places all over the file, or else of the first block with any."""

    def foreign(block):
        return [line for line in block.split(b"\n") if not line.isascii()]

    lines = foreign(head)
    if len(head) < BLOCK:
        return lines
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
        size = os.fstat(stream.fileno()).st_size
        for i in range(1, PLACES + 1):
            stream.seek(len(head) + (size - len(head)) * i // (PLACES + 1))
            if stream.readline(BLOCK).endswith(b"\n"):  # it began somewhere in a line
                lines += foreign(stream.read(BLOCK // PLACES))
        stream.seek(len(head))
    while not lines and (block := stream.read(BLOCK)):
        lines = foreign(block + stream.readline(BLOCK))
    return lines


def can_decode(line, encoding):
    try:
        codecs.getincrementaldecoder(encoding)().decode(line)  # incremental: a cut last character is no error
    except UnicodeDecodeError:
        return False
    return True


def score(lines, encoding):
    """Share of common characters among those that are not ASCII; 0 if more than a tenth of the lines do not decode."""
    if sum(can_decode(line, encoding) for line in lines) < 0.9 * len(lines):
        return 0.0
    found = [c for c in b"\n".join(lines).decode(encoding, "ignore") if c > "\x7f"]
    return sum(map(COMMON.__contains__, found)) / max(len(found), 1)


def wide_score(head, encoding):
    """Share of ASCII and common characters."""
    text = head.decode(encoding, "ignore")
    return sum(c in COMMON or "\t" <= c <= "\x7f" for c in text) / max(len(text), 1)


def clearly_best(scores):
    """The name with the highest score, None unless it stands out."""
    *_, other, best = sorted(scores, key=scores.get)
    return best if scores[best] > max(0.1, 2 * scores[other]) else None
