"""Arithmetic over the real tokens of padded batches; tiny models and batches that the tests of every stage use."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_same, conversations, float64, ragged, tiny, widen

from alignment.objective import masked_mean
from alignment.rollout import in_batches, sequence_scores
from dataset.batches import pad_batch
from ppo_train import masked_whiten

# masked arithmetic and batches


@float64
@torch.no_grad()
def test_sequence_scores_reads_the_last_real_token_whatever_the_padding():
    model, rows = tiny(scalar_head=True), conversations((4, 3), (2, 12), (9, 1))
    rows[0] = (rows[0][0][:-1] + [0], rows[0][1])  # a last token with the id of the padding
    alone = torch.cat([model.values(torch.tensor([ids]))[:, -1] for ids, _ in rows])
    for padding in (0, 7):
        batch = widen(pad_batch(rows), padding)
        assert_same(sequence_scores(model, batch["ids"], batch["lengths"]), alone)


@torch.no_grad()
def test_scores_are_not_rounded_to_bfloat16_under_autocast():
    model, ids = tiny(scalar_head=True), torch.arange(64).view(2, 32) % 40
    torch.nn.init.normal_(model.scalar.weight)
    with torch.autocast("cpu", torch.bfloat16):
        values = model.values(ids)
    assert values.dtype == torch.float32 and (values != values.bfloat16().float()).float().mean() > 0.9
    torch.testing.assert_close(values, model.values(ids), atol=0.3, rtol=0)  # the trunk was, by 2^-9 each product


def test_masked_mean_and_whiten_ignore_padding():
    x, mask = torch.tensor([[9e9, 1.0, 2, -9e9], [3, 6, 9e9, 9e9]]), torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0]])
    assert masked_mean(x, mask).item() == 3
    white = masked_whiten(x, mask)  # deviations -2, -1, 0, 3 and variance 3.5
    expected = torch.tensor([[0, -2.0, -1, 0], [0, 3, 0, 0]]) / math.sqrt(3.5)
    torch.testing.assert_close(white, expected)
    torch.testing.assert_close(masked_whiten(F.pad(x, (0, 3), value=5.0), F.pad(mask, (0, 3)))[:, :4], white)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_in_batches_restores_the_order_and_the_width(batch_size):
    batch, widths = ragged((2, 9), (3, 1), (1, 4), (8, 2), (2, 3)), []

    def next_tokens(rows):
        widths.append(rows.ids.size(1))
        assert rows.ids.shape == (len(rows.replies), int(rows.lengths.max()))
        return rows.ids[:, 1:] * rows.mask

    assert torch.equal(in_batches(next_tokens, batch, batch_size), batch.ids[:, 1:] * batch.mask)
    assert sorted(widths) == widths and widths[-1] == 11
    assert torch.equal(in_batches(lambda rows: rows.lengths, batch, batch_size), batch.lengths)


def test_rows_picks_the_replies_too():
    batch = ragged((2, 9), (3, 1), (1, 4))
    rows = batch.rows(torch.tensor([2, 1]))
    assert rows.replies == [batch.replies[2], batch.replies[1]]
    assert rows.ids.shape == (2, 5) and rows.mask.sum(1).tolist() == [4, 1]
    assert rows.ids[0].tolist() == batch.ids[2, :5].tolist() and rows.lengths.tolist() == [5, 4]


def test_rows_of_similar_length_go_together():
    batch = ragged((2, 9), (3, 1), (1, 4), (8, 2), (2, 3))  # 11, 4, 5, 10, 5 tokens
    parts = batch.by_length(torch.tensor([3, 0, 4, 2]), 2)
    assert [part.tolist() for part in parts] == [[4, 2], [3, 0]]  # of equal length, in their old order
