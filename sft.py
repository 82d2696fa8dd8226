"""Supervised fine-tuning: learn to answer, with the loss on answer tokens only (InstructGPT, arXiv:2203.02155, step 1).

A conversation is `question <bos> answer <eos>`, turn by turn; every answer token and its <eos> count, nothing else. The
loss of an optimizer step is normalised once, over all micro-batches and processes, so that accumulation equals the
large batch. With packing=True a row holds several conversations, none of which sees another.

Reads data/<name>/sft.pkl and a pretrained checkpoint; writes a run directory.

    python sft.py configs/demo/sft.py --learning_rate=1e-3
"""

import common.early  # noqa: F401 - before what takes seconds to import

from pathlib import Path

import torch

from common import checkpoint, distributed
from common.config import ConfigError, parse_config, run
from common.metrics import share
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.stage import Stage
from dataset.batches import (
    BatchOrder,
    PackedOrder,
    epoch_order,
    keep_multiple,
    pack_batch,
    pad_batch,
    to_device,
)
from dataset.examples import Examples
from dataset.formats import DataError, load_pkl
from model import document_starts

PANELS = [
    ("loss (nats per answer token)", ["train/loss", "val/loss"]),
    ("share of replies that end", ["val/eos_rate"]),
    ("learning rate", ["train/learning_rate"]),
    ("gradient norm", ["train/grad_norm"]),
]


def loss_weights(loss_mask, example_weight, documents=None):
    """Weight of each token before normalisation: loss_mask (B, T) -> (B, T).

    "token": 1 on each answer token. "example": each conversation's answer tokens sum to 1, so that an answer of three
    tokens is not drowned by one of a hundred. documents (B, T), where rows are packed: whose each token is.
    """
    if example_weight == "token":
        return loss_mask
    if documents is None:
        documents = torch.zeros_like(loss_mask, dtype=torch.int64)
    counts = torch.zeros_like(loss_mask).scatter_add_(1, documents, loss_mask)  # of a row's conversations
    return loss_mask / counts.gather(1, documents).clamp(min=1)


def answer_loss(model, batch, weights):
    """sum of weights * nll over the answers: ids (B, T), weights (B, T) aligned with ids."""
    documents = batch["documents"][:, :-1] if "documents" in batch else None
    documents = batch.get("starts", documents)  # of the same, where they are known
    return model(batch["ids"][:, :-1], batch["ids"][:, 1:], weights[:, 1:], documents, batch["keep"])


def make_order(train, config, max_seq_len):
    """Which conversations batch i of the run holds: one a row, or several where packing is on; and a line about it."""
    if not config["packing"]:
        order = BatchOrder(len(train), config["batch_size"], config["seed"], train.lengths, train.path)
        return order, "one conversation a row"
    room = config["pack_len"] or max_seq_len
    longest = int(train.lengths.max(initial=2))
    if not longest <= room <= max_seq_len:
        limits = f"{longest}, the longest conversation, to {max_seq_len}, the model's context"
        raise ConfigError(f"pack_len={room}: {limits}, are possible; 0 is all of it")
    order = PackedOrder(train.lengths, room, config["batch_size"], config["seed"], train.path)
    return order, f"{len(train) / order.rows:.1f} conversations a row of {room}, {order.fill:.1%} of it real tokens"


def make_batch(train, chosen, multiple=1):
    """The padded batch of what an order chose: indices of conversations, or a list of such, one for each row."""
    if isinstance(chosen, list):
        return pack_batch([[train[i] for i in row] for row in chosen], multiple)
    return pad_batch([train[i] for i in chosen], multiple=multiple)


def fetch(train, order, step, config, env):
    """The micro-batches of this process in a step, on their way to the device, and the real tokens in them.

    Their weights are divided by one normaliser for the whole step; the gradients are averaged over the processes, hence
    the mean.
    """
    accumulation, batches = config["grad_accumulation_steps"], []
    for micro in range(accumulation):
        n = (step * accumulation + micro) * env.world_size + env.rank
        batch = make_batch(train, order[n], keep_multiple(env.device))
        batch["weights"] = loss_weights(batch["loss_mask"], config["example_weight"], batch.get("documents"))
        if "documents" in batch:
            batch["starts"] = document_starts(batch["documents"][:, :-1])
        batches.append(batch)
    total = distributed.mean(sum(batch["weights"][:, 1:].sum().item() for batch in batches), env)
    for batch in batches:
        batch["weights"] /= total
    tokens = sum(batch["lengths"].sum().item() for batch in batches)
    return [to_device(batch, env.device) for batch in batches], tokens


@torch.no_grad()
def evaluate(model, val, tokenizer, config, env, n_prompts):
    """Loss, weighted as in training, on validation conversations; eos rate on n_prompts of their questions; samples."""
    model.eval()
    losses, total = [], 0.0
    for i in range(0, min(len(val), config["eval_examples"]), 32):
        rows = [val[j] for j in range(i, min(i + 32, len(val), config["eval_examples"]))]
        batch = pad_batch(rows, multiple=keep_multiple(env.device))
        batch["weights"] = loss_weights(batch["loss_mask"], config["example_weight"])
        total += batch["weights"][:, 1:].sum().item()
        batch = to_device(batch, env.device)
        with env.autocast():
            losses.append(answer_loss(model, batch, batch["weights"]))
    loss = sum(part.item() for part in losses)
    prompts = [question(*val[i]) for i in range(min(len(val), n_prompts))]
    by_length, replies = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for i in range(0, len(prompts), 50):
        batch = by_length[i : i + 50]
        sampling = dict(temperature=0.8, top_p=0.9, eos_id=tokenizer.eos_id, seed=[config["seed"] + j for j in batch])
        sampling["dtype"] = env.generation_dtype
        new = model.generate([prompts[j] for j in batch], config["eval_new_tokens"], **sampling).tokens
        replies |= zip(batch, new, strict=True)
    model.train()
    eos_rate = share([reply[-1] == tokenizer.eos_id for reply in replies.values()])
    samples = [(tokenizer.decode(prompt), tokenizer.decode(replies[i])) for i, prompt in enumerate(prompts[:8])]
    return {"val/loss": loss / total, "val/eos_rate": eos_rate}, samples


def question(ids, loss_mask):
    """The ids before the first answer, ending with <bos>: what the model is asked to continue."""
    return ids[: loss_mask.argmax()].tolist()


def main(argv=None):
    config = parse_config("sft", argv, __doc__)
    stage = Stage("sft", config, PANELS)
    if stage.finished:
        return
    env, data = stage.env, Path(config["data"])
    parent, tokenizer = stage.load_parent()
    stage.check_data("sft.pkl")
    arrays = load_pkl(data / "sft.pkl")
    examples = Examples(arrays, "", tokenizer.vocab_size, data / "sft.pkl", parent.model_config["max_seq_len"])
    train, val = examples.split()
    for side, name in ((train, "training"), (val, "held-out")):
        if not len(side):
            raise DataError(f"{data / 'sft.pkl'}: no {name} conversation; more or another val_share are needed")
    val = val.select(epoch_order(len(val), config["seed"], 0))
    order, rows_hold = make_order(train, config, parent.model_config["max_seq_len"])

    model = checkpoint.build_model(parent).to(env.device)
    distributed.compiled(model, env, config)
    forward = distributed.wrap(model, env, config)
    optimizer = build_optimizer(model, config)
    stage.start(model, optimizer, tokenizer, parent)
    if env.is_main:
        epochs = config["max_steps"] * config["grad_accumulation_steps"] * env.world_size / order.per_epoch
        print(f"{len(train):,} training and {len(val):,} validation conversations; {epochs:.2f} epochs; {rows_hold}")

    batches, tokens = fetch(train, order, stage.first, config, env)
    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                n_prompts = config["eval_prompts"] if step == config["max_steps"] else config["eval_prompts"] // 4
                stage.report(step, *evaluate(stage.whole, val, tokenizer, config, env, n_prompts))
            if stage.due(step, "save_interval"):
                stage.save(step)
            if stage.ends(step):
                break

            losses = []
            for batch in batches:
                distributed.sync(forward, last=batch is batches[-1])
                with env.autocast():
                    micro_loss = answer_loss(forward, batch, batch["weights"])
                micro_loss.backward()
                losses.append(micro_loss.detach())
            seen = tokens
            batches, tokens = fetch(train, order, step + 1, config, env)  # while an accelerator still computes
            loss = distributed.mean(sum(part.item() for part in losses), env)
            grad_norm = stage.clip_and_step(step, loss)
            metrics = {"train/loss": loss, "train/learning_rate": lr, "train/grad_norm": grad_norm}
            stage.log(step + 1, int(distributed.all_sum(seen, env)), metrics)
    stage.close()


if __name__ == "__main__":
    run(main)
