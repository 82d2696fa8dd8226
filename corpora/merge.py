"""Shards joined into the artifacts: which documents stay, and what is written of those.

`why` (N,) tells of each document of all shards, in order, why it goes, as an index of REASONS; `keep` and `is_val` (N,)
whether it stays and whether it is held out.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from corpora.dedup import near_duplicates
from corpora.shards import SAMPLES, Outcomes
from dataset import formats

REASONS = ["", "duplicate", "near-duplicate", "not needed"]  # why (N,) is an index: 0 is kept, else not
SPLITS = {"train": False, "val": True}


def per_shard(shards, *arrays):
    """(shard, its columns, its slice of each array) of every shard."""
    start = 0
    for shard in shards:
        columns = shard.columns()
        stop = start + len(columns["content"])
        yield shard, columns, *(array[start:stop] for array in arrays)
        start = stop


def compares(part, config):
    """Whether near-duplicates are looked for; not among pairs, as those of one question are alike by nature."""
    return config["dedup"] == "near" and part != "rm"


def choose(part, shards, own, config):
    """(why, is_val) of all documents of all shards (N,): 0 keeps one, else REASONS[why]; whether it is held out.

    The first of equal documents stays, and a near-duplicate of a validation document leaves training. `own` says which
    shards are of sources that dropped their own duplicates, as the demo's: two reviews may well differ in signs alone.
    """
    columns = [shard.columns() for shard in shards]
    content = np.concatenate([c["content"] for c in columns])
    # the rule of clean.is_validation, on the hashes that records.columns_of kept
    is_val = np.concatenate([c["key"] for c in columns]) < np.uint64(config["val_share"] * 2**64)
    why = np.zeros(len(content), np.uint8)
    if config["dedup"] != "none":
        copies = np.ones(len(content), bool)
        copies[np.unique(content, return_index=True)[1]] = False
        why[copies] = REASONS.index("duplicate")
    if compares(part, config):
        mark_near_duplicates(Path(config["out"]) / "work" / part / "signatures.bin", shards, why, is_val)
    why[np.repeat(own, [len(c["content"]) for c in columns])] = 0
    if part == "prompts":
        for held_out, limit in ((False, config["prompts_train"]), (True, config["prompts_val"])):
            found = np.flatnonzero((why == 0) & (is_val == held_out))  # those with the lowest hashes stay
            why[found[np.argsort(content[found], kind="stable")[limit:]]] = REASONS.index("not needed")
    return why, is_val


def mark_near_duplicates(path, shards, why, is_val):
    """Compare the signatures of what is still kept, gathered in one file so that memory stays bounded."""
    width = 0
    with open(path, "wb") as file:
        for shard, columns, dropped in per_shard(shards, why):
            lengths = columns["signature_lengths"]
            width = max(width, int(lengths.max(initial=0)))
            for (signatures,) in shard.read("signature", lengths, dropped == 0):
                file.write(signatures.tobytes())
    kept = np.flatnonzero(why == 0)
    if len(kept):
        signatures = np.memmap(path, np.uint16, mode="r", shape=(len(kept), width))
        why[kept[near_duplicates(signatures, prefer=is_val[kept])]] = REASONS.index("near-duplicate")
    path.unlink()


def merge(part, shards, why, is_val, out, tokenizer):
    """Join a part's shards into its artifacts; returns what meta.json says of them, and {source: Outcomes}."""
    keep, out = why == 0, Path(out)
    said, counts = dict(), count_records(shards, keep, is_val)
    if part == "text":
        said["files"] = {"corpus.txt": write_text(out, shards, keep & ~is_val)}
    elif part == "pretrain":
        said = dict(files=write_bins(out, shards, keep, is_val, tokenizer.vocab_size), sources=counts)
    else:
        said["files"] = {f"{part}.pkl": write_pkl(out / f"{part}.pkl", shards, keep, is_val)}
    outcomes = count_outcomes(shards, why, tokenizer)
    said["tally"] = {part: {source: found.counts() | counts[source] for source, found in outcomes.items()}}
    if part != "text":
        said["lengths"] = {part: length_histogram(shards, keep)}
    return said, outcomes


def count_records(shards, keep, is_val):
    """{source: {split: {documents, tokens, characters}}}; tokens are 0 for plain text."""
    found = {}
    for shard, columns, kept, held_out in per_shard(shards, keep, is_val):
        tokens = shard.tokens(columns)
        splits = found.setdefault(
            shard.source, {split: Counter(documents=0, tokens=0, characters=0) for split in SPLITS}
        )
        for split, value in SPLITS.items():
            mask = kept & (held_out == value)
            sums = dict(tokens=int(tokens[mask].sum()), characters=int(columns["characters"][mask].sum()))
            splits[split].update(documents=int(mask.sum()), **sums)
    return {source: {split: dict(count) for split, count in splits.items()} for source, splits in found.items()}


def write_text(out, shards, keep):
    """corpus.txt: the documents, a line or several each."""
    documents = characters = 0
    with formats.atomic_write(Path(out) / "corpus.txt") as file:
        for shard, columns, mask in per_shard(shards, keep):
            for (text,) in shard.read("text", columns["text_lengths"], mask):
                file.write(text.tobytes())
            documents += int(mask.sum())
            characters += int(columns["characters"][mask].sum())
    return dict(documents=documents, characters=characters)


def write_bins(out, shards, keep, is_val, vocab_size):
    """train.<source>.bin and val.<source>.bin of every source."""
    files = {}
    for source in dict.fromkeys(shard.source for shard in shards):
        paths = [Path(out) / f"{split}.{source}.bin" for split in SPLITS]
        with formats.BinWriter(paths[0], vocab_size) as train, formats.BinWriter(paths[1], vocab_size) as val:
            for shard, columns, kept, held_out in per_shard(shards, keep, is_val):
                if shard.source != source:
                    continue
                for pieces in shard.read("tokens", columns["tokens_lengths"], kept & ~held_out, kept & held_out):
                    train.write(pieces[0])
                    val.write(pieces[1])
        for path, writer in zip(paths, (train, val), strict=True):
            files[path.name] = dict(tokens=writer.tokens, sha256=writer.sha256)
    return files


def write_pkl(path, shards, keep, is_val):
    """sft.pkl, rm.pkl or prompts.pkl: flat arrays of all records, filled shard by shard."""
    names = list(dict.fromkeys(shard.source for shard in shards))
    columns = [columns for _, columns in per_shard(shards)]
    tasks = np.repeat([names.index(shard.source) for shard in shards], [len(c["content"]) for c in columns])
    arrays = dict(is_val=is_val[keep], task=tasks[keep].astype(np.uint8), task_names=names)
    arrays["label"] = np.concatenate([c["label"] for c in columns])[keep]
    for stream, dtype in shards[0].dtypes.items():
        if stream == "signature":
            continue
        lengths = np.concatenate([c[f"{stream}_lengths"] for c in columns])[keep]
        items = join(shards, keep, stream, np.empty(lengths.sum(dtype=np.int64), dtype))
        if stream.endswith("loss_mask"):
            items = np.packbits(items, bitorder="little")
        else:
            arrays[stream.replace("tokens", "offsets")] = np.cumsum([0, *lengths], dtype=np.int64)
        arrays[stream] = items
    formats.save_pkl(path, arrays)
    tokens = np.concatenate([shard.tokens(c) for shard, c in zip(shards, columns, strict=True)])[keep]
    splits = {split: arrays["is_val"] == value for split, value in SPLITS.items()}
    return {split: dict(examples=int(m.sum()), tokens=int(tokens[m].sum())) for split, m in splits.items()}


def join(shards, keep, stream, items):
    """Fill `items` with a stream of all kept documents."""
    done = 0
    for shard, columns, mask in per_shard(shards, keep):
        for (piece,) in shard.read(stream, columns[f"{stream}_lengths"], mask):
            items[done : done + len(piece)] = piece
            done += len(piece)
    return items


def count_outcomes(shards, why, tokenizer):
    """{source: Outcomes}; a document whose `why` (N,) is not 0 was dropped by the merge, for REASONS[why]."""
    found = {}
    for shard, columns, dropped in per_shard(shards, why):
        outcomes = found.setdefault(shard.source, Outcomes())
        outcomes.add(shard.outcomes)
        stream = next(iter(shard.dtypes))
        for number, reason in enumerate(REASONS[1:], 1):
            which = np.flatnonzero(dropped == number)
            outcomes.move(reason, len(which))
            for i in which[np.argsort(columns["content"][which], kind="stable")[:SAMPLES]]:
                items = shard.document(stream, columns[f"{stream}_lengths"], i)
                text = items.tobytes().decode() if stream == "text" else tokenizer.decode(items)
                outcomes.sample(reason, int(columns["content"][i]), f"{shard.folder.name}, record {i}", text)
    return found


def length_histogram(shards, keep):
    """{source: {half octave: documents}}: a document of t tokens is in half octave floor(2 log2(t))."""
    found = {shard.source: Counter() for shard in shards}
    for shard, columns, mask in per_shard(shards, keep):
        lengths = np.maximum(shard.tokens(columns)[mask], 1)
        octaves, counts = np.unique(np.floor(2 * np.log2(lengths)).astype(int), return_counts=True)
        found[shard.source].update(dict(zip(octaves.tolist(), counts.tolist(), strict=True)))
    return {source: {str(octave): counts[octave] for octave in sorted(counts)} for source, counts in found.items()}
