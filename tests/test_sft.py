"""Supervised fine-tuning: the loss by hand and beside Hugging Face's, packed rows against one example at a time."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from chains import (
    HALF,
    assert_same_run,
    failure,
    losses,
    make_data,
    make_model,
    metrics,
    options_of,
    train,
    train_in_two_sittings,
    train_rows,
)
from parallel import assert_same_training, torchrun_stage
from tiny import VOCAB, assert_same, conversations, examples, float64, gradients, tiny, widen

import sft
from common.checkpoint import CheckpointError
from common.config import ConfigError
from dataset.batches import pack_batch, pad_batch
from dataset.formats import load_pkl, save_pkl
from interop import exchange, hf

# two turns with two answers among them: question <bos> answer <eos>, twice
TURNS = (np.random.default_rng(9).integers(3, VOCAB, 11).tolist(), [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1])
ROWS = [*conversations((4, 3), (2, 12), (9, 1)), TURNS, *conversations((3, 6), seed=1)]


def weigh(batch, example_weight):
    return sft.loss_weights(batch["loss_mask"], example_weight, batch.get("documents"))


def backward(model, batches, example_weight):
    """Loss of a step of these micro-batches and its gradient, flat."""
    weights = [weigh(batch, example_weight) for batch in batches]
    total, loss = sum(w[:, 1:].sum() for w in weights), 0.0
    for batch, w in zip(batches, weights, strict=True):
        part = sft.answer_loss(model, batch, w / total)
        part.backward()
        loss += part.item()
    return loss, gradients(model)


# the loss


def test_loss_weights():
    mask = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert torch.equal(sft.loss_weights(mask, "token"), mask)
    each = torch.tensor([[0.0, 0.5, 0.5, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert torch.equal(sft.loss_weights(mask, "example"), each)


def test_loss_weights_of_packed_rows():
    mask = torch.tensor([[0.0, 1, 1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 1, 1, 1, 1]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(sft.loss_weights(mask, "token", documents), mask)
    each = torch.tensor([[0, 0.5, 0.5, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0.25, 0.25, 0.25, 0.25]])
    assert torch.equal(sft.loss_weights(mask, "example", documents), each)


@float64
@pytest.mark.parametrize("example_weight", ["token", "example"])
def test_gradient_does_not_depend_on_micro_batches_or_padding(example_weight):
    model, rows = tiny(), ROWS[:4]
    _, whole = backward(model, [pad_batch(rows)], example_weight)
    assert whole.abs().max() > 1e-3
    for parts, padding in (
        ([rows[:2], rows[2:]], 0),
        ([[row] for row in rows], 0),
        ([rows], 6),
        ([rows[:3], rows[3:]], 6),
    ):
        _, found = backward(model, [widen(pad_batch(part), padding) for part in parts], example_weight)
        assert_same(found, whole)


@float64
@pytest.mark.parametrize("example_weight", ["token", "example"])
def test_packed_rows_equal_their_examples_one_by_one(example_weight):
    model = tiny()
    loss, single = backward(model, [pad_batch([row]) for row in ROWS], example_weight)
    first, second, third, turns, last = ROWS
    for parts in (
        [[[first, second], [third, turns, last]]],
        [[[first], [turns, second]], [[last, third]]],
        [[[turns, third]], [[second], [first, last]]],
    ):
        found, gradient = backward(model, [pack_batch(part) for part in parts], example_weight)
        assert found == pytest.approx(loss, rel=1e-9)
        assert_same(gradient, single)


@float64
@torch.no_grad()
def test_answer_loss_counts_answer_tokens_and_nothing_else():
    model, nats = tiny(), 0.0
    for ids, mask in ROWS:
        logps = model(torch.tensor([ids])).log_softmax(-1)[0]
        nats -= sum(logps[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
    for batch in (pad_batch(ROWS), pack_batch([ROWS[:2], ROWS[2:]])):
        assert sft.answer_loss(model, batch, batch["loss_mask"]).item() == pytest.approx(nats, rel=1e-9)


@float64
@torch.no_grad()
def test_a_packed_example_is_untouched_by_what_shares_its_row():
    model, (other,) = tiny(), conversations((3, 6), seed=7)
    for row in (ROWS[1], TURNS):
        alone = model(torch.tensor([row[0]]))[0]
        for packed, at in (([ROWS[0], row], 7), ([row, ROWS[0]], 0), ([other, row, other], 9)):
            batch = pack_batch([packed])
            logits = model(batch["ids"], documents=batch["documents"])[0, at : at + len(row[0])]
            assert_same(logits, alone)


def test_pack_batch():
    batch = pack_batch([[([5, 6], [0, 1]), ([7, 8, 9], [0, 1, 1])], [([4], [1]), ([3, 2], [1, 1])]])
    assert batch["ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]]
    assert batch["documents"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]
    assert batch["lengths"].tolist() == [5, 3]
    # the first token of an example counts nowhere, even if its data says so
    assert batch["loss_mask"].tolist() == [[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert batch["keep"].tolist() == [0, 2, 3, 5]  # of the 8 positions that predict something


def test_question_is_what_stands_before_the_first_answer():
    ids, mask = np.array([5, 6, 1, 7, 2, 8, 1, 9, 2]), np.array([0, 0, 0, 1, 1, 0, 0, 1, 1])
    assert sft.question(ids, mask) == [5, 6, 1]


@float64
def test_loss_and_gradients_are_those_of_hugging_face():
    """LlamaForCausalLM on a padded batch with labels of -100 outside the answers, as its Trainer computes the loss."""
    ours = tiny()
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
        intermediate_size=ours.config.hidden_dim, max_position_embeddings=32, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    theirs, names = transformers.LlamaForCausalLM(config), {}
    for name, p in ours.named_parameters():
        names[exchange.renamed(name, 1)] = hf.reorder(name, p.detach(), ours.config, hf.pairs_to_halves)
    missing, unexpected = theirs.load_state_dict(names, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # tied
    batch = pad_batch(ROWS)
    labels = batch["ids"].masked_fill(batch["loss_mask"] == 0, -100)
    attended = (torch.arange(labels.size(1)) < batch["lengths"][:, None]).long()
    counted = int(batch["loss_mask"].sum())  # Trainer's num_items_in_batch: those of the whole step
    loss = theirs(input_ids=batch["ids"], attention_mask=attended, labels=labels, num_items_in_batch=counted).loss
    loss.backward()

    packed = pack_batch([ROWS[:2], ROWS[2:]])
    found = sft.answer_loss(ours, packed, packed["loss_mask"] / counted)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)  # its rotary tables are float32
    gradient = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = gradient[exchange.renamed(name, 1)].grad
        mine = hf.reorder(name, p.grad, ours.config, hf.pairs_to_halves)
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5, msg=name)


def test_a_batch_is_made_as_the_order_says():
    data, options = examples(ROWS), dict(batch_size=2, seed=0, pack_len=0)
    order, said = sft.make_order(data, options | dict(packing=True), 32)
    batch = sft.make_batch(data, order[0])
    assert order.rows == 2 and said == "2.5 conversations a row of 32, 79.7% of it real tokens"  # 51 of 64
    assert int(batch["lengths"].sum()) == 51 and batch["documents"].max(1).values.min() > 0
    order, said = sft.make_order(data, options | dict(packing=False), 32)
    batch = sft.make_batch(data, order[0])
    assert order.per_epoch == 2 and said == "one conversation a row" and "documents" not in batch


@pytest.mark.parametrize("pack_len", [13, 33, -1])
def test_rows_that_hold_too_little_or_too_much_are_refused(pack_len):
    options = dict(batch_size=1, seed=0, packing=True)
    with pytest.raises(ConfigError, match=f"pack_len={pack_len}: 14, the longest conversation, to 32, the model's"):
        sft.make_order(examples(ROWS), options | dict(pack_len=pack_len), 32)
    assert sft.make_order(examples(ROWS), options | dict(pack_len=14), 32)[0].rows == 5


# the stage

PACKED = dict(packing=True, batch_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of a small chain, a model that knows nothing yet, and a packed run."""
    folder = tmp_path_factory.mktemp("sft")
    make_data(folder, "sft")
    make_model(folder, "pretrain")
    train(folder, "sft", folder / "sft", **PACKED)
    return folder


def test_a_packed_run_learns_and_takes_more_tokens_a_step(folder, tmp_path):
    rows = metrics(folder / "sft")
    assert rows[0]["val/loss"] == pytest.approx(math.log(540), rel=0.02) and rows[-1]["val/loss"] < rows[0]["val/loss"]
    train(folder, "sft", tmp_path, batch_size=2)
    single = metrics(tmp_path)
    assert single[0] == rows[0]  # validation is that of examples, however training packs them
    assert rows[-2]["train/tokens"] > 1.5 * single[-2]["train/tokens"] > 0
    assert losses(folder / "sft")[0] == pytest.approx(losses(tmp_path)[0], rel=0.02)


def test_packed_stopped_and_resumed_equals_uninterrupted(folder, tmp_path, capsys):
    train_in_two_sittings(folder, "sft", tmp_path / "two", capsys, **PACKED)
    assert_same_run(tmp_path / "two", folder / "sft")


def test_a_run_from_before_packing_can_be_resumed_as_it_was(folder, tmp_path):
    train(folder, "sft", tmp_path, save_interval=HALF)
    uninterrupted = shutil.copytree(tmp_path, tmp_path.with_name("uninterrupted"))
    payload = torch.load(tmp_path / f"ckpt-{HALF}.pt", weights_only=True)
    for key in ("packing", "pack_len"):
        del payload["config"][key]
    torch.save(payload, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="packing is False in .* and True in this run's config"):
        train(folder, "sft", tmp_path, save_interval=HALF, resume=True, packing=True)
    train(folder, "sft", tmp_path, save_interval=HALF, resume=True)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("is_val", False, "no held-out conversation; more or another val_share are needed"),
        ("is_val", True, "no training conversation; more or another val_share are needed"),
        ("loss_mask", 0, "example 0 has no answer, by its loss_mask"),
        (None, None, r"\d+ training examples do not fill one batch of 1000000: choose a smaller batch_size"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_in_one_line(folder, tmp_path, capsys, name, value, message):
    shutil.copytree(folder / "data", tmp_path / "data")
    arrays = load_pkl(folder / "data" / "sft.pkl")
    if name:
        arrays[name] = np.full_like(arrays[name], value)
    save_pkl(tmp_path / "data" / "sft.pkl", arrays)
    changes = dict(data=tmp_path / "data", verify_data=False) | ({} if name else dict(batch_size=1_000_000))
    line = failure(capsys, sft.main, options_of(folder, "sft", tmp_path / "out", changes))
    assert re.fullmatch(f"error: {tmp_path / 'data' / 'sft.pkl'}: {message}", line)
    assert not (tmp_path / "out").exists()


@float64
def test_micro_batches_of_packed_rows_add_up(folder, tmp_path):
    """The rows of a step are the same in four micro-batches of one as in two of two."""
    train(folder, "sft", tmp_path / "two", **PACKED)
    train(folder, "sft", tmp_path / "four", packing=True, batch_size=1, grad_accumulation_steps=4)
    assert_same_training(tmp_path / "four", tmp_path / "two")


@float64
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_split_the_packed_rows(folder, tmp_path, parallel):
    changes = PACKED | dict(grad_accumulation_steps=1, parallel=parallel)
    train(folder, "sft", tmp_path / "one", **PACKED)
    torchrun_stage(tmp_path, 2, "sft", options_of(folder, "sft", tmp_path / "two", changes))
    assert_same_training(tmp_path / "two", tmp_path / "one")
    assert train_rows(tmp_path / "two")[-1]["train/tokens"] == train_rows(tmp_path / "one")[-1]["train/tokens"]
