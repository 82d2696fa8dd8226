"""Direct preference optimization: learn from pairs without a reward model (Rafailov et al., arXiv:2305.18290, eq. 7).

The log-probability of an answer is the sum over its tokens, <eos> included. The reference is the checkpoint that the
stage starts from; its log-probabilities are computed once and kept in out/ref_logps.npz. `loss` picks DPO, IPO or
cDPO. Optionally adds the loss of the chosen answer (`sft_coef`), which keeps it from becoming less likely. Reads
data/<name>/{rm.pkl, prompts.pkl} and an SFT checkpoint; writes a run directory.

    python dpo_train.py configs/demo/dpo.py --beta=0.3
"""

import common.early  # noqa: F401 - before what takes seconds to import

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from alignment.objective import wins
from alignment.pairs import pair_batch
from alignment.rewards import asked
from alignment.rollout import rollout, sequence_kl
from common import checkpoint, distributed, resume
from common.config import parse_config, run, said
from common.files import file_sha256
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.stage import Stage
from dataset.batches import BatchOrder, load_pairs, load_prompts, move
from dataset.formats import atomic_write

PANELS = [
    ("loss of a pair", ["train/loss", "val/loss"]),
    ("preference accuracy", ["dpo/accuracy", "val/accuracy"]),
    ("reward margin (nats)", ["dpo/margin", "val/margin"]),
    ("log pi/ref of an answer (nats)", ["*/chosen_logratio", "*/rejected_logratio"]),
    ("log pi of an answer (nats)", ["dpo/chosen_logps", "dpo/rejected_logps"]),
    ("KL to the reference (nats per reply)", ["val/kl"]),
    ("share of replies that end", ["val/eos_rate"]),
]
CACHE = resume.REFERENCE
FALLEN = -10  # nats: the answers that people preferred have lost a factor of e^10, 22,000, in probability
MEASURES = "loss accuracy margin chosen_logratio rejected_logratio chosen_logps rejected_logps".split()


def dpo_loss(logps, ref_logps, tokens, beta, kind="sigmoid", label_smoothing=0.0):
    """The loss of each pair (B,) and its rewards beta * log pi/ref (2, B); all inputs (2, B), chosen and rejected.

    With h = (log pi/ref of chosen) - (log pi/ref of rejected):
    sigmoid  -log sigmoid(beta * h), log 2 at pi = ref
    cdpo     the same where a share label_smoothing of the pairs is the wrong way round (Mitchell 2023, eq. 3)
    ipo      (h - 1 / (2 * beta))^2 (Azar et al., arXiv:2310.12036, eq. 17), h from means over the `tokens` of an answer
    """
    rewards = beta * (logps - ref_logps)
    if kind == "ipo":
        chosen, rejected = (logps - ref_logps) / tokens
        return (chosen - rejected - 1 / (2 * beta)).square(), rewards
    margin = rewards[0] - rewards[1]
    if kind == "cdpo":
        return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin), rewards
    return -F.logsigmoid(margin), rewards


def measures(loss, logps, rewards, beta):
    """What is logged of each pair, as MEASURES names it: (7, B). Accuracy is 1/2 for a tie, as before step 1."""
    chosen, rejected = rewards
    return torch.stack([loss, wins(*rewards), chosen - rejected, *rewards / beta, *logps]).detach()


def pair_logps(model, batch, env):
    """Summed answer log-probabilities of a pair_batch and its answer tokens, (2, B) each, in one forward."""
    mask = batch["loss_mask"][:, 1:]
    with env.autocast():
        logps = model.token_logps(batch["ids"], mask=mask, keep=batch["keep"]).sum(1)  # (2B,)
    return logps.view(2, -1), mask.sum(1).view(2, -1)


def pairs_met(order, batches):
    """The examples in the first batches of an order, sorted: a short run meets few of them."""
    if batches >= order.per_epoch:
        return np.arange(order.n)
    return np.unique(np.concatenate([order[i] for i in range(max(1, batches))]))


@torch.no_grad()
def reference_logps(model, chosen, rejected, indices, env):
    """The reference's log-probabilities (2, N) of the pairs at `indices`, nan of others; the ranks share the work."""
    logps = torch.zeros(2, len(chosen), device=env.device)
    by_length = indices[np.argsort((chosen.lengths + rejected.lengths)[indices])]
    for part in np.array_split(by_length, max(1, len(indices) // 64))[env.rank :: env.world_size]:
        (at,) = move([torch.from_numpy(part)], env.device)
        logps[:, at] = pair_logps(model, pair_batch(chosen, rejected, part, env.device), env)[0]
    logps = distributed.summed(logps, env).cpu()
    logps[:, np.setdiff1d(np.arange(len(chosen)), indices)] = torch.nan
    return logps


def read_cache(path, facts, needed, verbose=True):
    """The arrays in a cache of reference log-probabilities that was made under these facts and has the pairs that are
    needed, indices into each array; else None, saying why. CheckpointError for what is no such cache."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            saved, arrays = json.loads(str(file["facts"])), [torch.from_numpy(file[name]) for name in ("train", "val")]
        other = [name for name in facts if saved.get(name) != facts[name]]
        reason = f"was made with another {' and '.join(other)}" if other else ""
        if not other and any(array[:, some].isnan().any() for array, some in zip(arrays, needed, strict=True)):
            reason = "has not all pairs that this run meets"
    except Exception as error:  # damaged bytes can raise anything
        raise checkpoint.CheckpointError(
            f"{path} is damaged, or not written by this stage, which needs this name: move it away ({said(error)})"
        ) from None
    if verbose:
        print(f"{path} {reason}: computing it again" if reason else f"reference log-probabilities from {path}")
    return None if reason else arrays


def cached_reference(stage, model, splits, needed):
    """Reference log-probabilities of each split's needed pairs [(2, N), (2, M)], from out/ref_logps.npz if it fits.

    All processes read them, or all compute them and the first one writes. --overwrite keeps the file, since it tells
    for itself what it was made from.
    """
    env, path = stage.env, stage.out / CACHE
    facts = {
        "checkpoint": stage.parent["sha256"],
        "rm.pkl": file_sha256(Path(stage.config["data"]) / "rm.pkl"),
        "dtype": str(env.dtype),
        "number of pairs": [len(pairs[0]) for pairs in splits],
    }
    logps = read_cache(path, facts, needed, env.is_main)
    if distributed.all_sum(logps is None, env):
        logps = [reference_logps(model, *pairs, some, env) for pairs, some in zip(splits, needed, strict=True)]
        if not all(array[:, some].isfinite().all() for array, some in zip(logps, needed, strict=True)):
            found = "its log-probabilities are not finite: weights are too large, or training diverged"
            raise checkpoint.CheckpointError(f"{stage.parent['path']}: {found}")
        if env.is_main:
            with atomic_write(path) as file:
                np.savez(file, facts=json.dumps(facts), train=logps[0].numpy(), val=logps[1].numpy())
    return logps


@torch.no_grad()
def evaluate(model, reference, pairs, ref_logps, prompts, tokenizer, objective, config, env):
    """The measures of validation pairs; KL, eos rate and samples from replies to held-out prompts."""
    results, n = [], ref_logps.size(1)
    for indices in np.array_split(np.arange(n), -(-n // 32)):
        logps, tokens = pair_logps(model, pair_batch(*pairs, indices, env.device), env)
        loss, rewards = objective(logps, ref_logps[:, indices].to(env.device), tokens)
        results.append(measures(loss, logps, rewards, config["beta"]))
    means = torch.cat(results, 1).mean(1).tolist()
    sampling = dict(eos_id=tokenizer.eos_id, seed=config["seed"], dtype=env.generation_dtype)
    batch = rollout(model, prompts, config["eval_new_tokens"], **sampling)
    metrics = {f"val/{name}": mean for name, mean in zip(MEASURES, means, strict=True)} | {
        "val/kl": sequence_kl(model, reference, batch).mean().item(),
        "val/eos_rate": batch.ended.float().mean().item(),
    }
    samples = [(asked(tokenizer, p), tokenizer.decode(r)) for p, r in zip(prompts, batch.replies, strict=True)]
    return metrics, samples[:6]


def warn_if_fallen(step, metrics):
    """Whether both answers have become much less likely than under the reference, the usual failure; says so."""
    chosen, rejected = metrics["val/chosen_logratio"], metrics["val/rejected_logratio"]
    fallen = max(chosen, rejected) < FALLEN
    if fallen:
        found = f"log pi/ref of an answer is {chosen:.1f} nats for chosen and {rejected:.1f} for rejected"
        text = f"step {step}: {found}: both fall; a larger beta, a lower learning_rate or sft_coef > 0 holds them up"
        tqdm.write(text, file=sys.stderr)
    return fallen


def main(argv=None):
    config = parse_config("dpo_train", argv, __doc__)
    stage = Stage("dpo", config, PANELS)
    if stage.finished:
        return
    env, data = stage.env, Path(config["data"])
    parent, tokenizer = stage.load_parent()
    stage.check_data("rm.pkl", "prompts.pkl")
    train, val = load_pairs(data / "rm.pkl", tokenizer.vocab_size, parent.model_config["max_seq_len"])
    lengths = sum(side.lengths for side in train)
    order = BatchOrder(len(train[0]), config["batch_size"], config["seed"], lengths, data / "rm.pkl")
    val = [side.select(np.arange(min(len(side), config["eval_pairs"]))) for side in val]
    room = parent.model_config["max_seq_len"], config["eval_new_tokens"]
    _, prompts = load_prompts(data / "prompts.pkl", tokenizer.vocab_size, *room, needed=["held-out"])
    prompts = prompts[: config["eval_prompts"]]

    model, reference = (checkpoint.build_model(parent).to(env.device).eval() for _ in range(2))  # no dropout
    reference.requires_grad_(False)
    for each in (model, reference):
        distributed.compiled(each, env, config)
    forward = distributed.wrap(model, env, config)
    optimizer = build_optimizer(model, config)
    stage.start(model, optimizer, tokenizer, parent)
    accumulation, beta, warned = config["grad_accumulation_steps"], config["beta"], False
    objective = partial(dpo_loss, beta=beta, kind=config["loss"], label_smoothing=config["label_smoothing"])

    def fetch(n):
        """Micro-batch n of this process with its reference log-probabilities, on its way to the device."""
        pairs = order[n * env.world_size + env.rank]
        (reference_of_pairs,) = move([ref_logps[:, pairs]], env.device)
        return pair_batch(*train, pairs, env.device) | {"ref_logps": reference_of_pairs}

    batches = config["max_steps"] * accumulation * env.world_size
    needed = pairs_met(order, batches), np.arange(len(val[0]))
    if env.is_main:
        pairs = f"{len(train[0]):,} training and {len(val[0]):,} validation pairs"
        print(f"{pairs}; {batches / order.per_epoch:.2f} epochs; {len(needed[0]):,} pairs need the reference")
    ref_logps, val_ref_logps = cached_reference(stage, reference, (train, val), needed)

    batch = fetch(stage.first * accumulation)
    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                held_out = val, val_ref_logps, prompts
                metrics, samples = evaluate(stage.whole, reference, *held_out, tokenizer, objective, config, env)
                stage.report(step, metrics, samples)
                warned = warned or warn_if_fallen(step, metrics)
            if stage.due(step, "save_interval"):
                stage.save(step)
            if stage.ends(step):
                break

            sums, tokens = torch.zeros(len(MEASURES), device=env.device), 0
            for micro in range(accumulation):
                distributed.sync(forward, last=micro == accumulation - 1)
                logps, answer_tokens = pair_logps(forward, batch, env)
                loss, rewards = objective(logps, batch["ref_logps"], answer_tokens)
                loss = loss - config["sft_coef"] * logps[0] / answer_tokens[0]
                (loss.mean() / accumulation).backward()
                sums += measures(loss, logps, rewards, beta).mean(1) / accumulation
                tokens += batch["tokens"]
                batch = fetch(step * accumulation + micro + 1)  # while an accelerator still computes
            loss, *others = (distributed.summed(sums, env) / env.world_size).cpu().tolist()
            grad_norm = stage.clip_and_step(step, loss)
            metrics = {"train/loss": loss} | {f"dpo/{k}": x for k, x in zip(MEASURES[1:], others, strict=True)}
            metrics |= {"train/learning_rate": lr, "train/grad_norm": grad_norm}
            stage.log(step + 1, int(distributed.all_sum(tokens, env)), metrics, shown=("train/loss", "dpo/accuracy"))
    stage.close()


if __name__ == "__main__":
    run(main)
