"""Train a lossless SentencePiece BPE vocabulary on plain text files.

Text files (UTF-8, a line is a sample) -> tokenizer.model, tokenizer.vocab, config.json in the folder `out`.
Nothing is normalised, spaces are kept, and characters outside the vocabulary (newlines among them) are cut
into bytes, so that decode(encode(x)) == x for any x. The space and printable ASCII are always in it.

    python -m tokenizer.train configs/demo/tokenizer.py --input=data/demo/corpus.txt --out=out/demo/tokenizer
"""

import common.early  # noqa: F401 - before what takes seconds to import

import io
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import sentencepiece

from common.config import parse_config, run
from common.files import lock, make_folder, read_json, save_config, unlock, write_file
from tokenizer import MODEL_FILE, SPACE_MARK, Tokenizer, TokenizerError

WRITTEN = (MODEL_FILE, "tokenizer.vocab", "config.json")
SAMPLE_LINES = 10_000  # kept aside to measure characters per token
SHOWN_PER_REASON = 5  # skipped lines named one by one, the rest only counted
RESERVED = re.compile("[\0\u2585]")  # SentencePiece's trainer drops lines holding these
REQUIRED = SPACE_MARK + "".join(map(chr, range(0x21, 0x7F)))  # however rare: a space in bytes would come back as U+2581
UNFINISHED = re.compile(rb"(?:[\xc0-\xff][\x80-\xbf]{0,2})?\Z")  # what may be half a character
ROWS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".bz2", ".xz", ".zst", ".zip")
STOPS = ("。！？；!?;", "，、,", " ")  # after which a line is cut that is too long: the first kind that it has


class Corpus:
    """The usable lines of text files; counts what it read, cut and skipped, and keeps a random sample."""

    def __init__(self, paths: list[str], max_line_bytes: int):
        if not paths:
            raise TokenizerError("input names no text file; give --input=FILE[,FILE...]")
        for path in map(Path, paths):
            if path.is_dir():
                raise TokenizerError(f"input {path}: a folder, not a text file")
            if not path.is_file():
                raise TokenizerError(f"input {path}: no such file")
            if path.suffix.lower() in ROWS:
                raise TokenizerError(f"input {path}: rows, not text: data_process.py makes text of them, --parts=text")
            if path.stat().st_size == 0:
                raise TokenizerError(f"input {path}: the file is empty")
        self.paths, self.max_line_bytes = paths, max_line_bytes
        self.lines = self.characters = 0
        self.cut: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.sample: list[str] = []
        self._random = random.Random(0)

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            with open(path, "rb") as file:
                for number, raw in pieces_of(file):
                    for line in self._usable(raw.rstrip(b"\r\n"), path, number):
                        self._count(line)
                        yield line

    def _usable(self, raw: bytes, path: str, number: int) -> list[str]:
        """What SentencePiece takes of a line: all of it, in pieces where it must be cut."""
        try:
            text = raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode()
        except UnicodeDecodeError as error:
            self.skipped["not UTF-8"] += 1
            if self.skipped["not UTF-8"] <= SHOWN_PER_REASON:
                where = f"byte 0x{raw[error.start]:02X} at {error.start + 1}"
                print(f"{path}:{number}: skipped, not UTF-8 ({where})")
            return []
        parts = RESERVED.split(text)
        pieces = [piece for part in parts for piece in cut_line(part, self.max_line_bytes) if piece]
        self.skipped["empty"] += not pieces
        self.cut["at U+0000 or U+2585"] += len(parts) > 1
        self.cut[f"longer than {self.max_line_bytes} bytes"] += len(raw) > self.max_line_bytes
        return pieces

    def _count(self, line: str) -> None:
        self.lines += 1
        self.characters += len(line)
        if len(self.sample) < SAMPLE_LINES:
            self.sample.append(line)
        elif (slot := self._random.randrange(self.lines)) < SAMPLE_LINES:
            self.sample[slot] = line


def pieces_of(file: BinaryIO, limit: int = 1 << 20) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line, of one longer than `limit` in several that end with whole characters of UTF-8."""
    number, rest = 1, b""
    while raw := rest + (more := file.readline(limit)):
        whole = not more or more.endswith(b"\n") or len(more) < limit
        rest = b"" if whole else UNFINISHED.search(raw)[0]
        yield number, raw[: len(raw) - len(rest)]
        number += whole


def cut_line(text: str, max_bytes: int) -> list[str]:
    """The text in pieces of at most max_bytes in UTF-8, cut after a sentence, else a comma, a space, anywhere."""
    raw, pieces, start = text.encode(), [], 0
    while len(raw) - start > max_bytes:
        room = raw[start : start + max_bytes].decode(errors="ignore")  # a character cut in two stays for the next piece
        ends = (max(map(room.rfind, stops)) + 1 for stops in STOPS)
        pieces.append(room[: next(filter(None, ends), len(room))])
        start += len(pieces[-1].encode())
    return [*pieces, raw[start:].decode()]


def train_bpe(corpus: Corpus, config: dict) -> bytes:
    """A SentencePiece model trained on the lines of `corpus`; same lines and config, same bytes."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type="bpe",
            vocab_size=config["vocab_size"],
            character_coverage=config["character_coverage"],
            required_chars=REQUIRED,
            input_sentence_size=config["input_sentence_size"],
            shuffle_input_sentence=True,  # by a seed fixed inside SentencePiece
            max_sentence_length=config["max_line_bytes"],
            split_digits=config["split_digits"],
            num_threads=config["num_threads"],
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=Tokenizer.pad_id,  # pad shares the id of unk, which byte fallback never produces
            bos_id=Tokenizer.bos_id,
            eos_id=Tokenizer.eos_id,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if corpus.lines == 0:
            convert = "; convert it: iconv -f GB18030 -t UTF-8" if corpus.skipped["not UTF-8"] else ""
            raise TokenizerError(f"no usable line in {', '.join(corpus.paths)}{convert}") from None
        reason = str(error).rpartition("] ")[2].strip() or str(error).strip()
        if too_few := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            raise TokenizerError(
                f"vocab_size {config['vocab_size']}: {too_few[1]} are needed, for 3 special pieces, 256 bytes, ASCII "
                f"and {config['character_coverage']:.2%} of the characters; raise it or lower character_coverage"
            ) from None
        raise TokenizerError(
            f"vocab_size {config['vocab_size']} on {corpus.lines:,} lines: SentencePiece says: {reason}"
        ) from None
    return model.getvalue()


def vocab_text(tokenizer: Tokenizer) -> str:
    """SentencePiece's .vocab: a piece, a tab and its score a line, in the order of the ids."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    return "".join(f"{sp.id_to_piece(i)}\t{sp.get_score(i):g}\n" for i in range(sp.get_piece_size()))


def characters_per_token(tokenizer: Tokenizer, lines: list[str]) -> float:
    return sum(map(len, lines)) / sum(map(len, tokenizer.encode_batch(lines)))


def refuse_others(out: Path, overwrite: bool, inputs: list[str]) -> None:
    """TokenizerError for files that would be replaced, unasked, of another stage or while they are read."""
    if os.path.lexists(out) and not out.is_dir():
        raise TokenizerError(f"out={out}: a file, not a folder: choose another --out")
    if (out / "ckpt.pt").exists():
        raise TokenizerError(f"{out / 'ckpt.pt'}: a run of another stage is there: choose another --out")
    for path in inputs:
        if Path(path).resolve() in [out.resolve() / name for name in WRITTEN]:
            raise TokenizerError(f"input {path}: training would replace it: choose another --out")
    there = [name for name in WRITTEN if (out / name).exists()]
    if "config.json" in there and "character_coverage" not in read_json(out / "config.json"):
        raise TokenizerError(
            f"{out / 'config.json'} is not of a tokenizer, but would be replaced: choose another --out"
        )
    unfinished = "config.json" in there and MODEL_FILE not in there  # what is left of one that was killed
    if there and not overwrite and not unfinished:
        raise TokenizerError(f"{out / there[0]} exists; give --overwrite to replace it, or another --out")


def main(argv: list[str] | None = None) -> None:
    config = parse_config("tokenizer", argv, __doc__)
    out = Path(config["out"])
    refuse_others(out, config["overwrite"], config["input"])
    corpus = Corpus(config["input"], config["max_line_bytes"])
    make_folder(out)
    lock(out)
    print(f"training {config['vocab_size']:,} pieces on {', '.join(corpus.paths)}")
    tokenizer = Tokenizer(train_bpe(corpus, config))
    (out / MODEL_FILE).unlink(missing_ok=True)  # of a run before: what follows is not its
    save_config(config, out)  # it tells whose the others are, so it is the first; the model is the last
    write_file(out / "tokenizer.vocab", vocab_text(tokenizer).encode())
    write_file(out / MODEL_FILE, tokenizer.model_bytes)
    skipped, cut = (
        ", ".join(f"{count:,} {reason}" for reason, count in found.items() if count) or "none"
        for found in (corpus.skipped, corpus.cut)
    )
    print(f"{corpus.lines:,} lines, {corpus.characters:,} characters; lines cut: {cut}; lines skipped: {skipped}")
    unlock(out)
    ratio = characters_per_token(tokenizer, corpus.sample)
    print(f"{ratio:.3f} characters per token on {len(corpus.sample):,} of these lines")
    print(f"wrote {out / MODEL_FILE}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256[:16]}")


if __name__ == "__main__":
    run(main)
