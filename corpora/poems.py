"""The Tang and Song poems of chinese-poetry (MIT) as data of the poet: regular ones, simplified, split by title.

Reads the npm package chinese-poetry, packed or unpacked, or a clone of its repository, and writes into the folder `out`

    poems.jsonl    {"text": "title\\nline，line。\\n..."}, a training poem a row
    heldout.jsonl  {"title", "author", "lines", "tones", "form"} of poems whose title no training poem has
    verse.json     the tones and rhyme classes of characters, counted from the training poems
    sft.jsonl and the like: the rows of corpora/poem_tasks.py
    source.json    what all this was made from

    python -m corpora.poems --poems=chinese-poetry-2.0.1.tgz --out=data/poems/rows
"""

import common.early  # noqa: F401 - before what takes seconds to import

import hashlib
import importlib.util
import json
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.config import ConfigError, parse_config, run
from common.files import file_sha256, new_folder, read_json, write_json, write_rows
from corpora.clean import char_ngrams, simplify, text_hash
from corpora.encodings import BLOCK, open_bytes, reading
from corpora.poem_tasks import write_tasks
from dataset.formats import DataError, escaped, writable
from verse import form_of, parse, render
from verse.tables import as_json, count_tables

MEMBER = re.compile(r"(?:^|/)(strains/json|quantangshi|全唐诗|json)/(poet\.(?:tang|song)\.\d+)\.json$")
WANTED = "the npm package chinese-poetry, as .tgz or unpacked, or a clone of its repository is needed"
POEM = dict(id=str, title=str, author=str, paragraphs=list)  # what a row has of poems, and of tones
TONES = dict(id=str, strains=list)
NOTE = re.compile(r"[（(].*?[)）]|[\[\]]")  # [] are round a character that the editors added
NUMBER = "[一二三四五六七八九十百千○〇]+"
PART = re.compile(f" 其?{NUMBER}$|{NUMBER}首$")  # 八首 其一: several poems of one title
COPIED = 10  # characters in a row that a training poem has too, for them to be copied
FILES = [f"{name}.jsonl" for name in ("poems", "heldout", "heldout_prompts", "prompts", "rm", "sft")]
FILES += ["verse.json", "source.json"]


class Poem(NamedTuple):
    """lines: without marks; tones: of each line 平, 仄 or ○ (either) a character, or None if they are not known."""

    title: str
    author: str
    lines: list
    tones: list | None

    @property
    def text(self):
        return f"{self.title}\n{render(self.lines)}"


def clean_title(title):
    """'春興八首（時在成都） 其一' -> '春興': without notes, and the same for all poems of a series."""
    title = " ".join(NOTE.sub("", title).split())
    while shorter := PART.sub("", title):
        if shorter == title:
            return title
        title = shorter
    return title


# an archive or a folder -> poems


def read_poems(path):
    """Every regular poem, in simplified characters: four or eight lines of five or seven."""
    if importlib.util.find_spec("opencc") is None:
        raise DataError(f"{escaped(path)}: its characters are traditional, so opencc is needed (pip install opencc)")
    found = False
    for rows, tones in pairs(path):
        found = True
        for row in rows:
            lines = parse("".join(row["paragraphs"]))
            if form_of(lines):
                yield simplified(row["title"], row["author"], lines, tones.get(row["id"]))
    if not found:
        raise DataError(f"{escaped(path)}: no poet.tang.0.json or the like in it; {WANTED}")


def simplified(title, author, lines, signs):
    """A Poem; its tones are kept where there is a sign for every character."""
    title, author, *simple = simplify("\n".join([clean_title(title), " ".join(author.split()), *lines])).split("\n")
    tones = parse("".join(signs or ()))
    aligned = list(map(len, tones)) == list(map(len, simple)) == list(map(len, lines))
    return Poem(title, author, simple, tones if aligned else None)


def pairs(path):
    """(rows, {id: strains}) of every file of poems and the file of tones that belongs to it, if there is one."""
    waiting = {}
    for name, data in members(path):
        kind, stem = MEMBER.search(name).groups()
        rows = read_rows(f"{escaped(path)}: {escaped(name)}", data, TONES if kind == "strains/json" else POEM)
        if kind == "strains/json":
            rows = {row["id"]: row["strains"] for row in rows}
        waiting.setdefault(stem, {})[kind == "strains/json"] = rows
        if len(waiting[stem]) == 2:
            both = waiting.pop(stem)
            yield both[False], both[True]
    yield from ((found[False], {}) for found in waiting.values() if False in found)


def read_rows(where, data, keys):
    """The rows of a file of JSON, each with these keys: text, or a list of texts; DataError that names the first that
    is not."""
    try:
        rows = json.loads(data)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not {error.encoding}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{where}: a list is needed, not {type(rows).__name__}")
    for i, row in enumerate(rows):
        for key, kind in keys.items():
            if not isinstance(row, dict) or not is_text(row.get(key), kind):
                what = "text is needed" if kind is str else "a list of text is needed"
                raise DataError(f"{where}: row {i + 1}: {key}: {what}")
    return rows


def is_text(value, kind=str):
    """Whether it is text, or if kind is list a list of text, that can be written: JSON can tell half a character."""
    if kind is list:
        return isinstance(value, list) and all(map(is_text, value))
    return isinstance(value, str) and writable(value) == value


def members(path):
    """(name, bytes) of every file that is wanted; an archive is read in its order, and never unpacked."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{escaped(path)}: not found; {WANTED}")
    with reading(path):
        if path.is_dir():
            for file in sorted(path.resolve().rglob("poet.*.json")):
                if MEMBER.search(file.as_posix()):
                    yield file.as_posix(), file.read_bytes()
            return
        try:
            with open_bytes(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isfile() and MEMBER.search(member.name):
                        yield member.name, archive.extractfile(member).read()
                while file.read(BLOCK):  # to the checksum at its end
                    pass
        except tarfile.TarError as error:
            raise DataError(f"{escaped(path)}: not a whole .tgz: {error}; {WANTED}") from None


def unique(poems):
    """Without those of the same text, in an order that does not depend on that of the files."""
    kept = {}
    for poem in sorted(poems, key=lambda poem: (text_hash("".join(poem.lines)), poem.title, poem.author)):
        kept.setdefault("".join(poem.lines), poem)
    return list(kept.values())


def is_held_out(title, share):
    return text_hash(title, "poems") < share * 2**64


# copies


def ngrams_of(texts):
    """A hash of every COPIED characters in a row of poems, each without its title: sorted (N,) uint64."""
    bodies = ["".join(parse(text.partition("\n")[2])) for text in texts]
    return np.unique(np.concatenate([char_ngrams(body, COPIED) for body in bodies]))


def copied(lines, ngrams):
    """Share of lines all of whose characters are in COPIED characters in a row, of one line or several, that `ngrams`
    has too."""
    hashes = char_ngrams("".join(lines), COPIED)
    found = ngrams[np.searchsorted(ngrams[:-1], hashes)] == hashes
    covered = np.zeros(sum(map(len, lines)), bool)
    for start in np.flatnonzero(found):
        covered[start : start + COPIED] = True
    ends = np.cumsum([len(line) for line in lines])
    return sum(covered[end - len(line) : end].all() for line, end in zip(lines, ends, strict=True)) / max(len(lines), 1)


# the entry


def identity(config):
    """What decides every byte that is written: the content of the source and the settings."""
    path, digest = Path(config["poems"]), hashlib.sha256()
    if path.is_file():
        sha256 = file_sha256(path)
    else:
        for name, data in members(path):
            digest.update(f"{'/'.join(MEMBER.search(name).groups())} {hashlib.sha256(data).hexdigest()}\n".encode())
        sha256 = digest.hexdigest()
    return dict(sha256=sha256, held_out=config["held_out"], seed=config["seed"])


def main(argv=None):
    config = parse_config("poem_data", argv, __doc__)
    if not config["poems"]:
        raise ConfigError(f"poems=: {WANTED}")
    out, source = Path(config["out"]), identity(config)
    if (out / "source.json").is_file() and read_json(out / "source.json") == source:
        print(f"{out}: made from the same poems before")
        return
    with new_folder(out, config["overwrite"], FILES) as folder:
        poems = unique(read_poems(config["poems"]))
        heldout = [poem for poem in poems if is_held_out(poem.title, config["held_out"])]
        training = [poem for poem in poems if not is_held_out(poem.title, config["held_out"])]
        tables = count_tables((poem.lines, poem.tones) for poem in training)
        if not tables.tones:
            raise DataError(f"{escaped(config['poems'])}: no regular poems with tones (strains/json) in it; {WANTED}")
        write_json(folder / "verse.json", as_json(tables))
        write_rows(folder / "poems.jsonl", (dict(text=poem.text) for poem in training))
        write_rows(folder / "heldout.jsonl", (dict(p._asdict(), form=form_of(p.lines)) for p in heldout))
        write_tasks(training, heldout, tables, folder, config["seed"])
        write_json(folder / "source.json", source)
    classes = len({classes[0] for classes in tables.rhymes.values()})
    print(f"{out}: {len(training):,} poems to train on, {len(heldout):,} held out")
    print(f"tones of {len(tables.tones):,} characters, {classes} rhyme classes")


if __name__ == "__main__":
    run(main)
