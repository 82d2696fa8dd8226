"""What data_process.py packs into a .pkl, from lists."""

import numpy as np

from dataset.formats import token_dtype


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
