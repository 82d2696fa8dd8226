"""Checkpoints: a round trip is exact, and what does not fit a model or an optimizer is refused before it does harm."""

import hashlib
import re
from dataclasses import replace

import pytest
import sentencepiece
import torch
from saving import CONFIG, TOKENIZER, tiny, write

from common import checkpoint
from common.checkpoint import CheckpointError, build_model, load, restore
from model import Llama, ModelConfig


def train(model, optimizer, steps: int) -> list[float]:
    """Steps on random tokens: the losses depend on weights, optimizer moments and the random state alike."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 48, (2, 9))
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_round_trip_keeps_every_field(tmp_path):
    model, parent = tiny(), dict(path="out/pretrain/ckpt.pt", stage="pretrain", sha256="0" * 64)
    write(tmp_path, model, parent=parent, extra=dict(position=3), document_ids=(1, 1))
    ckpt = load(tmp_path)
    assert (ckpt.path, ckpt.stage, ckpt.step, ckpt.tokens_seen) == (tmp_path / "ckpt.pt", "sft", 7, 700)
    assert (ckpt.tokenizer, ckpt.parent, ckpt.quant, ckpt.document_ids) == (TOKENIZER, parent, None, [1, 1])
    assert ckpt.config == CONFIG | {"out": str(tmp_path)}
    assert ckpt.training["extra"] == dict(position=3)
    assert ckpt.git_commit is None or re.fullmatch("[0-9a-f]{40}", ckpt.git_commit)
    assert ckpt.weights.keys() == model.state_dict().keys()
    rebuilt = build_model(ckpt)
    assert rebuilt.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor), name


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_resumed_training_equals_uninterrupted_training(tmp_path, make):
    model = tiny(dropout=0.1)
    optimizer = make(model.parameters(), lr=0.1)
    train(model, optimizer, 3)
    write(tmp_path, model, optimizer=optimizer)
    expected = train(model, optimizer, 3)

    torch.manual_seed(999)
    ckpt = load(tmp_path)
    again = Llama(ModelConfig(**ckpt.model_config))
    optimizer = make(again.parameters(), lr=0.7)
    restore(ckpt, again, optimizer)
    assert train(again, optimizer, 3) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_several_optimizers_are_restored_in_order(tmp_path):
    model = tiny()
    parts = [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]
    optimizers = [torch.optim.SGD(parts[0], lr=0.1, momentum=0.9), torch.optim.AdamW(parts[1], lr=0.2)]
    write(tmp_path, model, optimizer=optimizers)
    fresh = [torch.optim.SGD(parts[0], lr=1.0), torch.optim.AdamW(parts[1], lr=1.0)]
    restore(load(tmp_path), model, fresh)
    assert [each.param_groups[0]["lr"] for each in fresh] == [0.1, 0.2]
    with pytest.raises(CheckpointError, match="optimizer"):
        restore(load(tmp_path), model, fresh[0])


def test_weights_are_stored_in_float32(tmp_path):
    model = tiny().bfloat16()
    write(tmp_path, model)
    assert {tensor.dtype for tensor in load(tmp_path).weights.values()} == {torch.float32}


def test_parent_of_is_the_sha256_of_the_file(tmp_path):
    write(tmp_path)
    expected = hashlib.sha256((tmp_path / "ckpt.pt").read_bytes()).hexdigest()
    parent = checkpoint.parent_of(load(tmp_path))
    assert parent == dict(path=str(tmp_path / "ckpt.pt"), stage="sft", sha256=expected)


def test_scalar_head_takes_the_trunk_of_a_language_model(tmp_path):
    for tied in (True, False):
        model = tiny(tied=tied)
        write(tmp_path, model)
        value_model = build_model(load(tmp_path), scalar_head=True)
        assert value_model.config.scalar_head
        trunk = {name: tensor for name, tensor in model.state_dict().items() if name != "output.weight"}
        assert value_model.state_dict().keys() == trunk.keys() | {"scalar.weight"}
        assert all(torch.equal(value_model.state_dict()[name], tensor) for name, tensor in trunk.items())
        ids = torch.randint(0, 48, (2, 5))
        assert torch.equal(value_model.hidden(ids), model.hidden(ids))
        assert torch.equal(value_model.values(ids), torch.zeros(2, 5))


def test_a_trained_scalar_head_is_kept_and_is_no_language_model(tmp_path):
    model = tiny(scalar_head=True)
    torch.nn.init.normal_(model.scalar.weight)
    write(tmp_path, model)
    for scalar_head in (None, True):
        assert torch.equal(build_model(load(tmp_path), scalar_head).scalar.weight, model.scalar.weight)
    with pytest.raises(CheckpointError, match=r"scalar.weight is \(1, 16\) in the file, missing in the model"):
        build_model(load(tmp_path), scalar_head=False)


def test_weights_that_do_not_fit_are_named_with_both_shapes(tmp_path):
    write(tmp_path)
    ckpt = load(tmp_path)
    wider = replace(ckpt, model_config=ckpt.model_config | {"hidden_dim": 96})
    with pytest.raises(CheckpointError) as caught:
        build_model(wider)
    assert str(tmp_path / "ckpt.pt") in str(caught.value)
    assert "layers.0.feed_forward.w1.weight is (64, 16) in the file, (96, 16) in the model" in str(caught.value)
    for scalar_head in (None, True):
        weights = {name: tensor for name, tensor in ckpt.weights.items() if name != "norm.weight"}
        with pytest.raises(CheckpointError, match=r"norm.weight is missing in the file, \(16,\) in the model"):
            build_model(replace(ckpt, weights=weights), scalar_head)
    with pytest.raises(CheckpointError, match=r"extra is \(1,\) in the file, missing in the model"):
        build_model(replace(ckpt, weights=ckpt.weights | {"extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="n_experts"):
        build_model(replace(ckpt, model_config=ckpt.model_config | {"n_experts": 8}))


def test_restore_refuses_another_architecture_and_missing_training_state(tmp_path):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    write(tmp_path, model, optimizer=optimizer)
    other = tiny(n_kv_heads=4)
    with pytest.raises(CheckpointError, match="n_kv_heads is 2 there and 4 in this run's model") as caught:
        restore(load(tmp_path), other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert str(tmp_path / "ckpt.pt") in str(caught.value)
    write(tmp_path, model)
    for training in (None, {}, dict(data={"sft.pkl": "aa"})):
        torch.save(torch.load(tmp_path / "ckpt.pt", weights_only=True) | dict(training=training), tmp_path / "ckpt.pt")
        with pytest.raises(CheckpointError, match="saved without the optimizer"):
            restore(load(tmp_path), model, optimizer)


def test_an_optimizer_that_is_ahead_of_its_run_is_refused(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 3)
    write(tmp_path, model, optimizer=optimizer, step=2)
    with pytest.raises(CheckpointError, match="it has done 3 steps, the run 2"):
        restore(load(tmp_path), model, optimizer)
    write(tmp_path, model, optimizer=optimizer, step=2, stage="ppo")
    restore(load(tmp_path), model, optimizer)


def test_moments_of_another_precision_are_refused(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    write(tmp_path, model, optimizer=optimizer)
    ckpt = load(tmp_path)
    state = ckpt.training["optimizer"][0]["state"]
    state[0]["exp_avg"] = state[0]["exp_avg"].half()
    with pytest.raises(CheckpointError, match=r"ckpt.pt: .* exp_avg of parameter 0 is \(48, 16\) of torch.float16"):
        restore(ckpt, model, optimizer)


@pytest.fixture(scope="module")
def tokenizer_bytes(tmp_path_factory) -> bytes:
    prefix = tmp_path_factory.mktemp("tokenizer") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "tiny llama"] * 20),
        model_prefix=str(prefix),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()


def test_the_tokenizer_travels_in_the_checkpoint(tmp_path, tokenizer_bytes):
    write(tmp_path, tokenizer=tokenizer_bytes)
    tokenizer = checkpoint.tokenizer_of(load(tmp_path))
    assert tokenizer.model_bytes == tokenizer_bytes
    assert tokenizer.decode(tokenizer.encode("hello llama")).strip() == "hello llama"


def test_data_of_another_vocabulary_or_tokenizer_is_refused(tmp_path, tokenizer_bytes):
    write(tmp_path, tokenizer=tokenizer_bytes)
    ckpt, meta_path = load(tmp_path), tmp_path / "data" / "meta.json"
    tokenizer, sha256 = checkpoint.tokenizer_of(ckpt), hashlib.sha256(tokenizer_bytes).hexdigest()
    good = dict(vocab_size=tokenizer.vocab_size, tokenizer_sha256=sha256)
    checkpoint.check_data(tokenizer, ckpt.path, good, meta_path)
    for key, wrong in (("vocab_size", 64793), ("tokenizer_sha256", "ab" * 32)):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check_data(tokenizer, ckpt.path, good | {key: wrong}, meta_path)
        assert f"{key} is {good[key]} in {ckpt.path} and {wrong} in {meta_path}" == str(caught.value)
