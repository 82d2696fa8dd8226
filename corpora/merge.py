"""Shards joined into the artifacts: which documents stay, and what is written of those.

`why` (N,) tells of each record of all shards, in order, why it goes, as an index of REASONS, and `repeats` (N,) which
one it repeats, -1 if none; `keep` and `is_val` (N,) whether it stays and whether it is held out.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from corpora.dedup import (
    CONVERSATION_THRESHOLD,
    THRESHOLD,
    is_copied_conversation,
    is_copied_document,
    near_duplicates,
)
from corpora.records import STREAMS
from corpora.shards import SAMPLES, Outcomes
from dataset import formats
from dataset.formats import DataError

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
    """Whether near-duplicates are looked for: not among pairs, as those of one question are alike by nature, nor among
    prompts, of which a word may make another."""
    return config["dedup"] == "near" and part not in ("rm", "prompts")


def by_question(part, config):
    """Whether a conversation goes when its questions are those of another, whatever the answers."""
    return config["dedup_questions"] and part == "sft"


def choose(part, shards, own, config):
    """(why, repeats, is_val) of all records of all shards (N,): 0 keeps one, else REASONS[why]; which one it repeats,
    or -1; whether it is held out.

    The first of equal records stays, and a near-duplicate of a validation record leaves training. `own` says which
    shards are of sources that dropped their own duplicates, as the demo's: two reviews may well differ in signs alone.
    """
    columns = [shard.columns() for shard in shards]
    content = np.concatenate([c["content"] for c in columns])
    keys = np.concatenate([c["key"] for c in columns])
    # the rule of clean.is_validation, on the hashes that records.columns_of kept
    is_val = keys < np.uint64(config["val_share"] * 2**64)
    why, repeats = np.zeros(len(content), np.uint8), np.full(len(content), -1)
    if config["dedup"] != "none":
        _, first, group = np.unique(content, return_index=True, return_inverse=True)
        copies = first[group] != np.arange(len(content))
        why[copies], repeats[copies] = REASONS.index("duplicate"), first[group][copies]
    if compares(part, config):
        mark_near_duplicates(part, Path(config["out"]) / "work" / part, shards, why, repeats, is_val)
    mine = np.repeat(own, [len(c["content"]) for c in columns])
    why[mine], repeats[mine] = 0, -1
    if (why == 0).any():
        is_val = keys < split_bound(part, keys[why == 0], len(keys), config)
    if part == "prompts":
        for held_out, limit in ((False, config["prompts_train"]), (True, config["prompts_val"])):
            found = np.flatnonzero((why == 0) & (is_val == held_out))  # those with the lowest hashes stay
            why[found[np.argsort(content[found], kind="stable")[limit:]]] = REASONS.index("not needed")
    return why, repeats, is_val


def split_bound(part, keys, read, config):
    """Below which hash (uint64) a record is held out: val_share of all; `keys` are those that stay of all `read`.

    Where chance leaves a split empty, as it may with few records, the bound moves to the nearest hash, so that each has
    a record, and a line says so: another part that has the same question may have it on the other side. Of prompts
    none need be held out if there is one only, or prompts_val is 0. Raises DataError where nothing can be parted.
    """
    bound, low, high = np.uint64(config["val_share"] * 2**64), keys.min(), keys.max()
    train_only = part == "prompts" and (low == high or not config["prompts_val"])
    if low == high and not train_only:
        left = "is left" if len(keys) == 1 else "are left, all with the same beginning"
        more = ", or cut a long text by txt_characters or the layout lines" if part in ("text", "pretrain") else ""
        rest = f"; dedup = {config['dedup']} dropped the rest" if len(keys) < read else ""
        found = f"{part}: {len(keys):,} of {read:,} records {left}, so that none can be held out"
        raise DataError(f"{found}; add others to its sources{more}{rest}")
    found = min(max(bound, np.uint64(0) if train_only else low + np.uint64(1)), high)
    if found != bound:
        side, other = ("held out", "train on") if found > bound else ("left to train on", "hold out")
        print(f"{part}: val_share = {config['val_share']}: by their hashes none of {len(keys)} records is {side}; the "
              f"one with the nearest hash is taken, which other parts may {other}")  # fmt: skip
    return found


def mark_near_duplicates(part, folder, shards, why, repeats, is_val):
    """Compare the signatures and the turns of what is still kept, in bounded memory."""
    kept = np.flatnonzero(why == 0)
    if not len(kept):
        return
    signatures, _ = gather(folder, shards, "signature", why == 0)
    turns, ends = gather(folder, shards, "turns", why == 0)
    is_copy = is_copied_conversation if part == "sft" else is_copied_document
    threshold = CONVERSATION_THRESHOLD if part == "sft" else THRESHOLD

    def confirm(*pair):
        return is_copy(*(json.loads(turns[ends[i] : ends[i + 1]].tobytes()) for i in pair))

    found = near_duplicates(signatures.reshape(len(kept), -1), is_val[kept], confirm, threshold)
    copies = found >= 0
    why[kept[copies]], repeats[kept[copies]] = REASONS.index("near-duplicate"), kept[found[copies]]


def gather(folder, shards, stream, keep):
    """A stream of all N kept records in one array, of a file without a name, and where each begins (N + 1,)."""
    lengths = [np.zeros(1, np.int64)]
    with tempfile.TemporaryFile(dir=folder) as file:
        for shard, columns, mask in per_shard(shards, keep):
            found = columns[f"{stream}_lengths"]
            lengths.append(found[mask])
            for (items,) in shard.read(stream, found, mask):
                file.write(items.tobytes())
        file.flush()
        return np.memmap(file, shards[0].dtypes[stream], "r"), np.cumsum(np.concatenate(lengths), dtype=np.int64)


def merge(part, shards, why, repeats, is_val, out, tokenizer):
    """Join a part's shards into its artifacts; returns what meta.json says of them, and {source: Outcomes}."""
    keep, out = why == 0, Path(out)
    said, counts = dict(), count_records(shards, keep, is_val)
    if part == "text":
        said["files"] = {"corpus.txt": write_text(out, shards, keep & ~is_val)}
    elif part == "pretrain":
        said = dict(files=write_bins(out, shards, keep, is_val, tokenizer.vocab_size), sources=counts)
    else:
        said["files"] = {f"{part}.pkl": write_pkl(out / f"{part}.pkl", shards, keep, is_val)}
    outcomes = count_outcomes(shards, why, repeats, tokenizer)
    said["tally"] = {part: {source: found.counts() | counts[source] for source, found in outcomes.items()}}
    if part != "text":
        said["lengths"] = {part: length_histogram(shards, keep)}
    return said, outcomes


def count_records(shards, keep, is_val):
    """{source: {split: {documents, tokens, characters, unknown}}}; tokens, some of them unknown, are 0 for plain text.

    Of conversations and pairs also examples and answer_tokens: a long conversation becomes several examples.
    """
    found = {}
    for shard, columns, kept, held_out in per_shard(shards, keep, is_val):
        numbers = dict(documents=np.ones(len(kept), int), tokens=shard.tokens(columns))
        numbers |= {name: columns[name] for name in ("characters", "unknown")}
        if any(stream.endswith("loss_mask") for stream in shard.dtypes):
            numbers |= dict(examples=examples_of(columns), answer_tokens=columns["answers"])
        splits = found.setdefault(shard.source, {split: Counter() for split in SPLITS})
        for split, value in SPLITS.items():
            mask = kept & (held_out == value)
            splits[split].update({name: int(values[mask].sum()) for name, values in numbers.items()})
    return {source: {split: dict(count) for split, count in splits.items()} for source, splits in found.items()}


def examples_of(columns):
    """Into how many examples each record was cut (N,)."""
    return columns.get("pieces_lengths", np.ones(len(columns["content"]), int))


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
    """sft.pkl, rm.pkl or prompts.pkl: flat arrays of all examples, filled shard by shard."""
    names = list(dict.fromkeys(shard.source for shard in shards))
    columns, streams = [columns for _, columns in per_shard(shards)], shards[0].dtypes
    tasks = np.repeat([names.index(shard.source) for shard in shards], [len(c["content"]) for c in columns])
    labels = np.concatenate([c["label"] for c in columns])
    examples = np.concatenate([examples_of(c) for c in columns])[keep]
    arrays = dict(is_val=np.repeat(is_val[keep], examples), task=np.repeat(tasks[keep].astype(np.uint8), examples))
    arrays |= dict(task_names=names, label=np.repeat(labels[keep], examples))
    for stream in streams:
        if stream not in STREAMS[path.stem] or stream == "pieces":
            continue
        items, lengths = join(shards, keep, stream)
        if stream == "fields":
            if len(items):
                ends, text = np.cumsum(lengths, dtype=np.int64), items.tobytes().decode()
                arrays[stream] = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
            continue
        if stream.endswith("loss_mask"):
            items = np.packbits(items, bitorder="little")
        else:
            lengths = join(shards, keep, "pieces")[0] if "pieces" in streams else lengths
            arrays[stream.replace("tokens", "offsets")] = np.cumsum([0, *lengths], dtype=np.int64)
        arrays[stream] = items
    formats.save_pkl(path, arrays)
    tokens = np.concatenate([shard.tokens(c) for shard, c in zip(shards, columns, strict=True)])[keep]
    splits = {split: is_val[keep] == value for split, value in SPLITS.items()}
    return {split: dict(examples=int(examples[m].sum()), tokens=int(tokens[m].sum())) for split, m in splits.items()}


def join(shards, keep, stream):
    """(a stream of all kept documents, how much of it is each one's)."""
    lengths = np.concatenate([columns[f"{stream}_lengths"] for _, columns in per_shard(shards)])[keep]
    items, done = np.empty(lengths.sum(dtype=np.int64), shards[0].dtypes[stream]), 0
    for shard, columns, mask in per_shard(shards, keep):
        for (piece,) in shard.read(stream, columns[f"{stream}_lengths"], mask):
            items[done : done + len(piece)] = piece
            done += len(piece)
    return items, lengths


def count_outcomes(shards, why, repeats, tokenizer):
    """{source: Outcomes}; a record whose `why` (N,) is not 0 was dropped by the merge, for REASONS[why].

    The place of one that was dropped as a copy tells what of.
    """
    found, starts = {}, np.cumsum([0] + [len(columns["content"]) for _, columns in per_shard(shards)])

    def place(i):
        number = int(np.searchsorted(starts, i, "right")) - 1
        lengths = shards[number].columns()["place_lengths"]
        return shards[number].document("place", lengths, int(i - starts[number])).tobytes().decode()

    for start, (shard, columns, dropped) in zip(starts, per_shard(shards, why), strict=False):
        outcomes = found.setdefault(shard.source, Outcomes())
        outcomes.add(shard.outcomes)
        outcomes.lost += int(columns["lost"][dropped == 0].sum())
        stream = next(iter(shard.dtypes))
        for number, reason in enumerate(REASONS[1:], 1):
            which = np.flatnonzero(dropped == number)
            outcomes.move(reason, len(which))
            for i in which[np.argsort(columns["content"][which], kind="stable")[:SAMPLES]]:
                if not outcomes.wants(reason, rank := int(columns["content"][i])):
                    break
                items = shard.document(stream, columns[f"{stream}_lengths"], i)
                text = items.tobytes().decode() if stream == "text" else tokenizer.decode(items)
                copied = repeats[start + i]
                where = place(start + i) + (f", like {place(copied)}" if copied >= 0 else "")
                outcomes.sample(reason, rank, where, text)
    return found


def length_histogram(shards, keep):
    """{source: {half octave: documents}}: a document of t tokens is in half octave floor(2 log2(t))."""
    found = {shard.source: Counter() for shard in shards}
    for shard, columns, mask in per_shard(shards, keep):
        lengths = np.maximum(shard.tokens(columns)[mask], 1)
        octaves, counts = np.unique(np.floor(2 * np.log2(lengths)).astype(int), return_counts=True)
        found[shard.source].update(dict(zip(octaves.tolist(), counts.tolist(), strict=True)))
    return {source: {str(octave): counts[octave] for octave in sorted(counts)} for source, counts in found.items()}
