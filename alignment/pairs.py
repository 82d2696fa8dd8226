"""Preference pairs on a device: the chosen answers of a batch, then the rejected ones, in one padded batch."""

from dataset.batches import keep_multiple, pad_batch, to_device


def pair_batch(chosen, rejected, indices, device):
    """Some pairs on their way to a device: ids (2B, T) and so on, as pad_batch; `tokens`, how many are no padding."""
    rows = [side[i] for side in (chosen, rejected) for i in indices]
    batch = pad_batch(rows, multiple=keep_multiple(device))
    tokens = int(batch["lengths"].sum())
    return to_device(batch, device) | {"tokens": tokens}
