"""What a data directory says of itself: meta.json for programs, report.md and lengths.png for people, dropped.jsonl to
look at what was left out; and the check that the files are still what meta.json says."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.files import changed, file_sha256, read_json, signed, write_file
from common.plots import new_figure, png
from common.tables import markdown_table
from corpora.encodings import escaped
from corpora.records import STREAMS
from dataset import formats
from dataset.corpus import Corpus
from dataset.examples import Examples
from dataset.formats import DataError

PARTS = tuple(STREAMS)  # in the order that they are shown
EXPECTED = ("blank", "not needed")  # reasons that are no loss
MANY = 0.05  # share of a source's records: to drop more is seldom meant
SAMPLE = {"part", "source", "reason", "place", "text"}  # keys of a row of dropped.jsonl
FACTS = ("val_share", "vocab_size", "tokenizer_sha256", "dtype")  # that all parts of a directory share


def start_meta(out, parts, val_share, tokenizer):
    """The meta.json to add `parts` to, without what it said of them before, and the names of their old files.

    Parts that stay must have been made with the same split and tokenizer: else validation text could stand in
    another part's training data, or the parts' ids could mean different things. DataError also for an old file that is
    no longer what meta.json says, or that it does not name: somebody's work may be in it.
    """
    path = Path(out) / "meta.json"
    if path.exists():
        refuse_changed(out)
    old = outdated(path) if path.exists() else {}
    meta = formats.load_meta(out) if old is None else {}
    known = meta.get("files", {}) if old is None else old
    for other in sorted(Path(out).glob("*")):  # a run that was killed wrote its meta.json first, and left its shards
        if not path.exists() and is_written(other.name):
            raise DataError(f"{other} is there, but no meta.json: it was not written here; choose another --out")
        if formats.OWN.fullmatch(other.name) and (part := part_of(other.name)) in parts and other.name not in known:
            if not (Path(out) / "work" / part).is_dir():
                raise DataError(
                    f"{other} would be replaced, but {path} does not name it: move it away, or choose another --out"
                )
    said = dict(sources={} if "pretrain" in parts else meta.get("sources", {}))
    for key in ("tally", "lengths", "command"):
        said[key] = {part: value for part, value in meta.get(key, {}).items() if part not in parts}
    files = {name: entry for name, entry in meta.get("files", {}).items() if entry["part"] not in parts}
    facts = dict(val_share=val_share)
    if tokenizer:
        facts |= dict(vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
    for key, value in facts.items():
        stay = dict.fromkeys(entry["part"] for entry in files.values() if key == "val_share" or entry["part"] != "text")
        if stay and meta.get(key) != value:
            raise DataError(
                f"{path}: {', '.join(stay)} has {key} {meta.get(key)}, not {value}; "
                "make those parts in this run too, or write to another --out"
            )
    if tokenizer:
        facts["dtype"] = formats.token_dtype(tokenizer.vocab_size).name
    replaced = {name for name in known if part_of(name) in parts}
    for name in sorted(replaced):
        other = Path(out) / name
        if other.exists() and file_sha256(other) != known[name].get("sha256"):
            raise DataError(f"{other}: changed since it was written: move it away, or choose another --out")
    facts = {key: meta[key] for key in FACTS if key in meta} | facts
    meta = dict(format_version=formats.FORMAT_VERSION, files=files) | facts | {key: v for key, v in said.items() if v}
    return meta, replaced  # its keys in an order that does not depend on where an earlier run was killed


def is_written(name):
    """Whether data_process.py writes a file of this name into `out`."""
    return bool(formats.OWN.fullmatch(name)) or name in ("meta.json", "report.md", "lengths.png", "dropped.jsonl")


def part_of(name):
    """The part that writes a data file of this name."""
    return "text" if name == "corpus.txt" else "pretrain" if name.endswith(".bin") else Path(name).stem


def refuse_own(out, jobs):
    """DataError if a file is to be read that this run writes, or may remove."""
    out = Path(out).resolve()
    for path in dict.fromkeys(part.path for job in jobs for part in job.unit.parts or [job.unit]):
        file = Path(path).resolve()
        if out / "work" in file.parents or out == file.parent and is_written(file.name):
            raise DataError(f"{escaped(path)}: a source that this run would overwrite: choose another --out")


def outdated(path):
    """The files that a meta.json of an older version of this code describes, none of which can still be read; None of
    one that is not older."""
    meta = read_json(path)
    version, files = meta.get("format_version"), meta.get("files")
    if type(version) is not int or version >= formats.FORMAT_VERSION:
        return None
    print(f"{path}: of format version {version}, starting anew", file=sys.stderr)
    files = files if isinstance(files, dict) else {}
    return {name: entry for name, entry in files.items() if formats.OWN.fullmatch(name) and isinstance(entry, dict)}


def add_part(out, meta, part, said, command):
    """Add what is known of one part to meta and write it."""
    for name, entry in said["files"].items():
        path = Path(out) / name
        entry |= dict(part=part, bytes=path.stat().st_size)
        entry.setdefault("sha256", file_sha256(path))
    for key, value in (said | dict(command={part: command})).items():
        meta.setdefault(key, {}).update(value)
    formats.save_meta(out, meta)


# for people


def write_report(out, meta, part, outcomes):
    """report.md and lengths.png of all parts; dropped.jsonl, in which `part`'s samples are replaced."""
    sections = [f"# {escaped(out)}\n"]
    for name in sorted(meta["tally"], key=PARTS.index):
        sections += [f"## {name}\n", part_table(name, meta["tally"][name]), ""]
    if lengths := meta.get("lengths"):
        histograms = {name: lengths[name] for name in sorted(lengths, key=PARTS.index)}
        write_file(Path(out) / "lengths.png", draw_lengths(histograms))
        sections.append("![documents by their length](lengths.png)\n")
    sections.append("dropped.jsonl has up to 20 records of each source and reason.\n")
    write_file(Path(out) / "report.md", signed("\n".join(sections)))

    path = Path(out) / "dropped.jsonl"
    rows = [row for _, row in dropped_rows(path) if row and row["part"] != part]
    for source, found in outcomes.items():
        for reason, samples in sorted(found.samples.items()):
            rows += [dict(part=part, source=source, reason=reason, place=p, text=text) for _, p, text in samples]
    rows.sort(key=lambda row: PARTS.index(row["part"]))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, lines.encode())


def dropped_rows(path):
    """(number, row) of each line of a dropped.jsonl, None for a row that `write_report` did not write."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        ours = isinstance(row, dict) and row.keys() == SAMPLE and row["part"] in PARTS
        yield number, row if ours else None


def refuse_changed(out):
    """DataError for what `write_report` would replace though somebody else wrote in it."""
    for path in (Path(out) / "report.md", Path(out) / "lengths.png"):
        if path.exists() and (why := changed(path)):
            raise DataError(f"{path} {why}: move it away, or choose another --out")
    for number, row in dropped_rows(path := Path(out) / "dropped.jsonl"):
        if row is None:
            raise DataError(f"{path}:{number}: a line that was not written here: move it away, or choose another --out")


def part_table(part, tally):
    """The table of one part: a row a source, read = written + dropped in each.

    Characters are those of the cleaned text; conversations may have been cut since, so that only documents have
    characters per token. They have examples instead, of which a long one gives several, and answer tokens, of which
    those that no example has room for are lost.
    """
    answers = part in ("sft", "rm")
    header = ["source", "read", "written", "train", "val", "characters", "tokens"]
    header += ["examples", "answer tokens"] if answers else ["characters per token"]
    header.append("dropped")
    rows = []
    for source, counts in tally.items():
        train, val = counts["train"], counts["val"]
        characters, tokens = (train[what] + val[what] for what in ("characters", "tokens"))
        why = [f"{reason} {n:,}" for reason, n in counts["dropped"].items()]
        remarks = [f"{what} {n:,}" for what, n in counts["remarks"].items()]
        dropped = f"{sum(counts['dropped'].values()):,}" + (f" ({', '.join(why)})" if why else "")
        dropped += f"; of the written: {', '.join(remarks)}" if remarks else ""
        dropped += f"; unknown tokens: {share:.2%}" if (share := unknown_share(counts)) else ""
        numbers = [counts["read"], counts["kept"], train["documents"], val["documents"], characters, tokens]
        if answers:
            examples, written = (train[what] + val[what] for what in ("examples", "answer_tokens"))
            more = [f"{examples:,}", f"{written:,} of {written + counts['answer_tokens_lost']:,}"]
        else:
            more = [f"{characters / tokens:.2f}" if part == "pretrain" and tokens else ""]
        rows.append([source, *(f"{n:,}" for n in numbers), *more, dropped])
    return markdown_table(header, rows)


def unknown_share(counts):
    """Share of a source's tokens that stand for characters which its vocabulary has neither a piece nor bytes for."""
    unknown, tokens = (sum(counts[split].get(what, 0) for split in ("train", "val")) for what in ("unknown", "tokens"))
    return unknown / max(tokens, 1)


def losses(part, tally, generated, tokenizer_name):
    """A line for each source of which much was dropped, or whose characters the vocabulary lacks.

    Of `generated` sources, the demo's, much is dropped by intent.
    """
    for source, counts in tally.items():
        found = {why: n for why, n in counts["dropped"].items() if why not in EXPECTED}
        if sum(found.values()) > MANY * counts["read"] and source not in generated:
            most = max(found, key=found.get)
            share = f"{sum(found.values()) / counts['read']:.0%} of {counts['read']:,} records dropped"
            yield f"warning: {part}: {source}: {share}, {found[most]:,} as {most}: look at them in dropped.jsonl"
        if share := unknown_share(counts):
            lost = f"{share:.2%} of the tokens of {source} are unknown to {tokenizer_name} (id 0), their text is lost"
            way_out = "; a vocabulary with byte fallback, as python -m tokenizer.train makes, loses none"
            yield f"{'warning: ' if share > 0.001 else ''}{part}: {lost}{way_out}"


def draw_lengths(histograms):
    """PNG: of each part, the share of documents by their length in tokens, a line a source."""
    figure = new_figure(8.4, 3.2 * len(histograms))
    for i, (part, sources) in enumerate(histograms.items()):
        axes = figure.add_subplot(len(histograms), 1, i + 1)
        for source, counts in sources.items():
            found = [int(octave) for octave in counts] or [0]
            octaves = np.arange(min(found) - 1, max(found) + 2)  # down to zero on both sides
            share = np.array([counts.get(str(octave), 0) for octave in octaves]) / max(sum(counts.values()), 1)
            axes.plot(2 ** ((octaves + 0.5) / 2), 100 * share, marker="o", markersize=4, linewidth=1.4, label=source)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel(f"{part} (% of documents)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return png(figure)


# the check


def verify(out):
    """Read every file of a data directory again; returns a line a file, or raises DataError at the first fault."""
    out, lines = Path(out), []
    meta = formats.load_meta(out)
    if not (meta.get("files") and meta.get("tally")):
        raise DataError(f"{out / 'meta.json'} names no files: the run that began it was cut off; run it again")
    for name, entry in meta["files"].items():
        path = out / name
        if wrong := formats.misfit(entry, dict(bytes=int, sha256=str), name):
            raise DataError(f"{out / 'meta.json'}: {wrong}")
        if not path.exists():
            raise DataError(f"{path} not found, though {out / 'meta.json'} describes it")
        if path.stat().st_size != entry["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size} bytes, but meta.json says {entry['bytes']}")
        if file_sha256(path) != entry["sha256"]:
            raise DataError(f"{path}: its sha256 is not the one in meta.json: it was changed or damaged")
        if path.suffix == ".pkl":
            verify_pkl(path, entry, meta["vocab_size"])
        lines.append(f"{path}  {entry['bytes']:,} bytes, sha256 {entry['sha256'][:16]}")
    if any(name.endswith(".bin") for name in meta["files"]):
        for split in ("train", "val"):
            verify_bins(Corpus(out, split), meta)
    for part, tally in meta["tally"].items():
        for source, counts in tally.items():
            if counts["read"] != counts["kept"] + sum(counts["dropped"].values()):
                raise DataError(f"{out / 'meta.json'}: {part}/{source}: read is not kept + dropped")
    return "\n".join([*lines, f"{out}: {len(lines)} files are what meta.json says"])


def verify_bins(corpus, meta, at_once=1 << 22):
    """Every id is in the vocabulary (Corpus.read sees to that), and each document ends in <eos>, id 2."""
    for source, (start, stop) in corpus.segments.items():
        ends = sum(int((corpus.read(i, min(i + at_once, stop)) == 2).sum()) for i in range(start, stop, at_once))
        documents = meta["sources"][source][corpus.split]["documents"]
        if ends != documents:
            raise DataError(f"{corpus.path}: {source} has {ends} documents, but meta.json says {documents}")


def verify_pkl(path, entry, vocab_size):
    arrays = formats.load_pkl(path)
    sides = ["chosen_", "rejected_"] if "chosen_tokens" in arrays else [""]
    for side in sides:
        examples = Examples(arrays, side, vocab_size, path)
        if len(examples) != (wanted := sum(entry[split]["examples"] for split in ("train", "val"))):
            raise DataError(f"{path} has {len(examples)} examples, but meta.json says {wanted}")
