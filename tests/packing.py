"""The artifacts of data_process.py, made of lists."""

import numpy as np

from dataset.formats import BinWriter, save_meta, token_dtype


def pack(sequences, dtype):
    """Lists end to end: (tokens, offsets), sequence i being tokens[offsets[i]:offsets[i + 1]]."""
    offsets = np.cumsum([0] + [len(s) for s in sequences], dtype=np.int64)
    tokens = np.fromiter((t for s in sequences for t in s), dtype=dtype, count=int(offsets[-1]))
    return tokens, offsets


def pack_examples(examples, vocab_size):
    """Flat tokens and offsets, and loss_mask in bits, of objects with ids and loss_mask."""
    tokens, offsets = pack([e.ids for e in examples], token_dtype(vocab_size))
    loss_mask, _ = pack([e.loss_mask for e in examples], np.uint8)
    return dict(tokens=tokens, offsets=offsets, loss_mask=np.packbits(loss_mask, bitorder="little"))


def make_bins(directory, sources, vocab_size=1000, split="train"):
    """train.<source>.bin of {source: ids}, and what meta.json says of them."""
    meta = dict(format_version=2, vocab_size=vocab_size, dtype=token_dtype(vocab_size).name, files={}, sources={})
    for name, ids in sources.items():
        with BinWriter(directory / f"{split}.{name}.bin", vocab_size) as writer:
            writer.write(ids[:3])
            writer.write(ids[3:])
        meta["files"][writer.path.name] = dict(part="pretrain", tokens=writer.tokens)
        counts = dict(documents=1, tokens=writer.tokens, characters=writer.tokens)
        meta["sources"][name] = dict(train=counts, val=counts)
    save_meta(directory, meta)
    return meta
