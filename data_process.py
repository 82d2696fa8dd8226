"""Turn raw Chinese corpora into the artifacts that every training stage reads, with flat memory and on all cores.

Reads the sources that `sources` names (--list_sources shows what is known), cleans them, drops duplicates, splits by
a hash of the text, so that no validation text stands in training and new data moves no old document, and writes to
`out`, as far as `parts` asks for it:

    text      corpus.txt          training documents, for tokenizer.train
    pretrain  train.<source>.bin, val.<source>.bin
    sft       sft.pkl             conversations
    rm        rm.pkl              prompts with a chosen and a rejected answer
    prompts   prompts.pkl         prompts for PPO and GRPO; without a source of their own, those of the pairs

and meta.json, which says what they hold, report.md and dropped.jsonl, which say what was left out. The input is cut
into units, each worker turns one at a time into a shard (out/work), and the shards are merged in order: the result
does not depend on the number of workers, and a run that was killed goes on where it was. Several machines make the
shards with --shard=i/n, and one merges them with --merge.

    python data_process.py --list_sources
    python data_process.py configs/demo/data.py --parts=text
    python -m tokenizer.train configs/demo/tokenizer.py
    python data_process.py configs/demo/data.py --parts=pretrain,sft,rm,prompts
    python data_process.py --sources=wikipedia=wiki.json,novels:txt=novels --parts=pretrain --out=data/zh
"""

import common.early  # noqa: F401 - before what takes seconds to import

import functools
import importlib.util
import json
import re
import shlex
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import ConfigError, UserError, parse_config, run
from common.files import lock, make_folder, naming, unlock
from corpora import reviews, sources
from corpora.clean import mask_personal, text_hash
from corpora.decontaminate import Decontaminator
from corpora.dedup import SHORT, conversation_signature, signature
from corpora.encodings import escaped, is_clean
from corpora.merge import by_question, choose, compares, merge
from corpora.meta import add_part, losses, refuse_own, start_meta, verify, write_report
from corpora.records import STREAMS, as_bytes, clean_record, columns_of, compared_turns, encode_records, texts_of
from corpora.shards import (
    Outcomes,
    Shard,
    ShardWriter,
    content_mark,
    make_missing,
    remove_all,
    unit_mark,
    unmade,
)
from dataset import formats
from dataset.formats import DataError, token_dtype
from tokenizer import Tokenizer, TokenizerError

SOURCES = sources.SOURCES | reviews.SOURCES
STAGES = dict(text="pretrain", pretrain="pretrain", sft="sft", rm="rm", prompts="prompts")  # of each part's sources
# Settings that no shard depends on: changing them makes none anew. The demo's own sources depend on all others.
FREE = """
    out parts sources hub tokenizer workers unit_bytes txt_characters shard merge keep_work verify list_sources
""".split()


def check_config(config):
    """ConfigError for a value that has the right type but no meaning here; returns (i, n) of --shard=i/n."""
    if not config["parts"]:
        raise ConfigError(f"parts=: some of {', '.join(STREAMS)} are needed")
    if Path(config["out"]).is_file():
        raise ConfigError(f"out = {config['out']}: a file, not a directory")
    if config["clean"]["to_simplified"] and importlib.util.find_spec("opencc") is None:
        raise ConfigError("clean.to_simplified needs the package opencc (pip install opencc)")
    if not config["shard"]:
        return 0, 1
    numbers = re.fullmatch(r"(\d+)/(\d+)", config["shard"])
    i, n = map(int, numbers.groups()) if numbers else (0, 0)
    if i >= n:
        raise ConfigError(f"shard = {config['shard']}: write i/n, i from 0 to n - 1, as 0/4")
    return i, n


# units -> shards


@dataclass(frozen=True)
class Job:
    """One unit of input on its way to a shard folder."""

    part: str
    unit: sources.Unit
    folder: Path
    config: dict
    tokenizer: bytes
    fingerprint: dict  # what the shard is made from


list_units = functools.cache(sources.list_units)  # what it says of files is said once for all parts


def list_jobs(part, config, tokenizer):
    """Every unit of the part's sources, in the order that their documents will have."""
    named = sources.parse_sources(config["sources"], SOURCES)
    if len(named) > 256:
        raise ConfigError(f"sources: {len(named)} of them, and no more than 256 can be told apart")
    stages = {SOURCES[layout].stage for _, layout, _ in named}
    stage = "rm" if part == "prompts" and "prompts" not in stages else STAGES[part]
    sha256, model_bytes = (tokenizer.sha256, tokenizer.model_bytes) if tokenizer else (None, b"")
    jobs = []
    for label, layout, path in named:
        if SOURCES[layout].stage != stage:
            continue
        if SOURCES[layout].generate:
            units = [sources.Unit(label, layout, "", "generated")]
            settings = {key: value for key, value in config.items() if key not in FREE}
            settings["files"] = [content_mark(reviews.resolve(config[key])) for key in reviews.FILES]
        else:
            sizes = config["unit_bytes"], config["txt_characters"]
            units = list_units(label, layout, path, sizes[0], config["hub"], sizes[1])
            settings = {key: config[key] for key in ("clean", "max_seq_len", "prompts_max_len")}
            settings["questions"] = load_decontaminator(*config["decontaminate"]).digest
            settings["compared"] = [compares(part, config), by_question(part, config)]
        for number, unit in enumerate(units):
            fingerprint = json.loads(json.dumps(settings | dict(tokenizer=sha256, unit=unit_mark(unit))))
            folder = Path(config["out"]) / "work" / part / f"{label}-{number:05d}"
            jobs.append(Job(part, unit, folder, config, model_bytes, fingerprint))
    if not jobs:
        raise ConfigError(f"parts: {part} needs a {stage} source; sources = {','.join(config['sources'])} has none")
    return jobs


def shard_dtypes(part, config, vocab_size):
    """{stream: dtype} of a part's shards: what becomes an artifact, then what only the merge reads."""
    dtypes = {name: token_dtype(vocab_size) if name.endswith("tokens") else np.uint8 for name in STREAMS[part]}
    dtypes |= dict(place=np.uint8) | (dict(pieces=np.uint32) if "pieces" in dtypes else {})
    if compares(part, config):
        dtypes |= dict(signature=np.uint16, turns=np.uint8)
    return dtypes


def read_unit(job, tokenizer, outcomes):
    """(place, cleaned record, remark or None) of a unit; what is dropped is counted."""
    source, config = SOURCES[job.unit.layout], job.config
    if source.generate:  # these clean their own text and drop its duplicates
        records = source.generate(config, tokenizer)
    else:
        records = sources.read_records(job.unit)
    decontaminator = load_decontaminator(*config["decontaminate"])
    for place, record, note in records:
        before = record
        if record is not None and not source.generate:
            if job.part == "prompts":
                record = before = {key: record[key] for key in ("messages", "fields") if key in record}
            record, why = clean_record(record, config["clean"])
            text = "\n".join(texts_of(record)) if record else ""
            if not is_clean(text):  # as JSON can escape them; the repair of the text would have removed them
                record, why = None, "lone surrogate"
            elif record and (missing := lacking(record, before, job.part)):
                record, why = None, missing
            elif decontaminator.contaminated(text):
                record, why = None, "in a benchmark"
            note = "; ".join(filter(None, (note, why))) if record else why
        if record is None:
            text = "\n".join(texts_of(before)) if before else ""
            sample = mask_personal(text) if config["clean"]["mask_personal"] else text
            outcomes.drop(note, text_hash(place), place, sample)
        else:
            yield place, record, note


def lacking(record, before, part):
    """What a record of messages lacks now that it is cleaned, of a text or of a difference; None where it is whole."""
    blank, was_blank = ([not m["content"].strip() for m in each.get("messages", []) if m["role"] == "user"]
                        for each in (record, before))  # fmt: skip
    if blank != was_blank or (part == "prompts" and blank[-1]):
        return "no question"
    if "chosen" in record and record["chosen"].strip() == record["rejected"].strip():
        return "chosen equals rejected"
    return None


@functools.lru_cache(maxsize=1)
def load_decontaminator(*paths):
    return Decontaminator(paths)


@functools.lru_cache(maxsize=1)
def load_tokenizer(model_bytes):
    return Tokenizer(model_bytes) if model_bytes else None


def batches(records):
    """Runs of at most 256 records and about a million characters: a novel may be one record."""
    batch, characters = [], 0
    for item in records:
        batch.append(item)
        characters += sum(map(len, texts_of(item[1])))
        if len(batch) == 256 or characters > 1_000_000:
            yield batch
            batch, characters = [], 0
    yield batch


def encode_batch(job, batch, tokenizer, outcomes):
    """[(record, {stream: values}), ...] of what is kept; all is counted."""
    max_len, rows = job.config["prompts_max_len" if job.part == "prompts" else "max_seq_len"], []
    encoded = encode_records(job.part, [record for _, record, _ in batch], tokenizer, max_len)
    for (place, record, remark), (streams, note, answers) in zip(batch, encoded, strict=True):
        if streams is None:
            outcomes.drop(note, text_hash(place), place, "\n".join(texts_of(record)))
            outcomes.lost += answers[1]
        else:
            outcomes.kept += 1
            outcomes.remark(remark)
            outcomes.remark(note)
            rows.append((record | dict(answers=answers), streams | for_merge(job, place, record)))
    return rows


def for_merge(job, place, record):
    """{stream: values} of what the merge compares records by, and names them by."""
    streams = dict(place=as_bytes(place))
    if not compares(job.part, job.config):
        return streams
    if "text" in record:
        turns, found = [record["text"]] if len(record["text"]) < SHORT else [], signature(record["text"])
    else:
        turns = compared_turns(record, by_question(job.part, job.config))
        found = conversation_signature("\n".join(turns))
    return streams | dict(signature=found, turns=as_bytes(json.dumps(turns)))


def make_shard(job):
    """Turn one unit into a shard folder; returns how many items (tokens, or bytes of text) it wrote."""
    tokenizer, outcomes, items = load_tokenizer(job.tokenizer), Outcomes(), 0
    dtypes = shard_dtypes(job.part, job.config, tokenizer.vocab_size if tokenizer else 0)
    with naming(job.config["out"]), ShardWriter(job.folder, dtypes) as shard:
        for batch in batches(read_unit(job, tokenizer, outcomes)):
            rows = encode_batch(job, batch, tokenizer, outcomes)
            streams = {name: [streams[name] for _, streams in rows] for name in dtypes}
            shard.write(streams, columns_of([record for record, _ in rows], by_question(job.part, job.config)))
            items += sum(map(len, streams[STREAMS[job.part][0]]))
        shard.finish(dict(fingerprint=job.fingerprint, outcomes=vars(outcomes)))
    return items


# shards -> artifacts


def open_shards(part, jobs, config, tokenizer):
    """The shards of all jobs, and what `choose` says of their records."""
    if missing := unmade(jobs):
        raise UserError(
            f"{part}: {len(missing)} of {len(jobs)} shards are missing or made from something else, the first is "
            f"{missing[0].folder}: run the --shard they belong to again, with this same config"
        )
    dtypes = shard_dtypes(part, config, tokenizer.vocab_size if tokenizer else 0)
    shards = [Shard(job.folder, job.unit.source, dtypes) for job in jobs]
    own = [SOURCES[job.unit.layout].generate is not None for job in jobs]
    why, repeats, is_val = choose(part, shards, own, config)
    hints = explain_empty(jobs, shards, config)
    if why.all():
        dropped = sum((shard.outcomes.dropped for shard in shards), Counter())
        dropped = ", ".join(f"{n} {why}" for why, n in dropped.items())
        left = [f"{part}: no record is left", *([f"dropped: {dropped}"] if dropped else []), *hints]
        raise DataError("; ".join(left))
    for hint in hints:
        print(f"{part}: no record of {hint}", file=sys.stderr)
    return shards, why, repeats, is_val


def explain_empty(jobs, shards, config):
    """Why each of these sources gave no record: no room, or a name that was given to another layout, most likely."""
    found, units = {}, {}
    for job, shard in zip(jobs, shards, strict=True):
        found.setdefault(shard.source, Outcomes()).add(shard.outcomes)
        units.setdefault(shard.source, []).append(job.unit)
    made = {job.unit.source for job in jobs if SOURCES[job.unit.layout].generate}
    hints = []
    for source in units:
        dropped = found[source].dropped
        if found[source].kept or source in made:
            continue
        if {"answer too long", "no room for the question"} & dropped.keys():
            hints.append(f"{source}: max_seq_len={config['max_seq_len']} is too small")
        elif not dropped or any(why.startswith(("no ", "not ", "unknown ")) for why in dropped):
            hints.append(sources.explain(units[source]))
    return [hint for hint in hints if hint]


def main(argv=None):
    config = parse_config("data_process", argv, __doc__)
    if config["list_sources"]:
        print(sources.list_sources(SOURCES))
        return
    if config["verify"]:
        print(verify(config["out"]))
        return
    i, n = check_config(config)
    out, parts = Path(config["out"]), [part for part in STREAMS if part in config["parts"]]
    tokenizer = Tokenizer.load(config["tokenizer"]) if parts != ["text"] else None
    try:
        if tokenizer and tokenizer.changes:
            print(f"{config['tokenizer']} changes text: {'; '.join(tokenizer.changes)}", file=sys.stderr)
    except TokenizerError as error:
        raise TokenizerError(f"{config['tokenizer']}: {error}") from None
    load_decontaminator.cache_clear()  # its files may have changed since another call
    list_units.cache_clear()
    load_decontaminator(*config["decontaminate"])  # its mistakes should show before any work is done
    jobs = {part: list_jobs(part, config, tokenizer) for part in parts}
    refuse_own(out, [job for part in parts for job in jobs[part]])
    make_folder(out)
    lock(out, shared=bool(config["shard"]))  # several machines may make shards at once
    meta, replaced = start_meta(out, parts, config["val_share"], tokenizer)
    if not config["merge"]:
        for part in parts:
            counted = "bytes" if part == "text" else "tokens"
            make_missing(jobs[part][i::n], make_shard, config["workers"], f"{part} units", counted)
        if config["shard"]:
            unlock(out)
            print(f"shard {i}/{n} is done; when all are, run the same command with --merge instead of --shard")
            return

    generated = {job.unit.source for part in parts for job in jobs[part] if SOURCES[job.unit.layout].generate}
    opened = {part: open_shards(part, jobs[part], config, tokenizer) for part in parts}
    named = {f"{split}.{job.unit.source}.bin" for job in jobs.get("pretrain", []) for split in ("train", "val")}
    if gone := sorted(name for name in replaced if name.endswith(".bin") and name not in named):
        print(f"removed {', '.join(gone)}: this run names no such source", file=sys.stderr)
    for name in replaced:
        (out / name).unlink(missing_ok=True)
    formats.save_meta(out, meta)  # a run cut off here leaves no file described wrongly
    command = escaped(shlex.join(["python", "data_process.py", *(sys.argv[1:] if argv is None else argv)]))
    for part in parts:
        with naming(out):
            said, outcomes = merge(part, *opened[part], out, tokenizer)
            add_part(out, meta, part, said, command)
            write_report(out, meta, part, outcomes)
    if not config["keep_work"]:  # not sooner: one that is killed before would make the shards of its first parts again
        for part in parts:
            remove_all(out / "work" / part)
        with suppress(OSError):  # another part's shards are still in it
            (out / "work").rmdir()
    unlock(out)
    print((out / "report.md").read_text(encoding="utf-8").rpartition("<!--")[0])
    for part in parts:
        for line in losses(part, meta["tally"][part], generated, config["tokenizer"]):
            print(line, file=sys.stderr)


if __name__ == "__main__":
    run(main)
