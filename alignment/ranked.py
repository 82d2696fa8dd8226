"""Preference pairs of a policy's own replies for DPO: sampled from a checkpoint, ranked by a function or a model.

Answers training prompts of `data` several times each, and pairs the best reply with the worst, the second best with the
second worst and so on, as far as `pairs` says and as their rewards differ. Writes a row a pair, {"prompt", "chosen",
"rejected"} or with "messages" where the prompt has several turns, which data_process.py reads as layout `pairs`.

    python -m alignment.ranked --ckpt=out/zh/sft --data=data/zh --reward=my_rewards:score --out=data/ranked.jsonl
    python data_process.py --sources=ranked:pairs=data/ranked.jsonl --parts=rm --out=data/ranked
"""

import common.early  # noqa: F401 - before what takes seconds to import

from pathlib import Path

import numpy as np

from alignment.functions import fields_taken
from alignment.rewards import Reward
from alignment.rollout import rollout
from common import checkpoint, resume
from common.config import ConfigError, UserError, parse_config, run
from common.distributed import setup
from common.files import check_folder, write_rows
from common.progress import Progress
from dataset.batches import load_prompts
from dataset.formats import load_meta
from tokenizer import prompt_turns


def rank_pairs(rewards, n):
    """[(better, worse), ...] of replies with these rewards: n pairs from the ends inwards, none of equal rewards."""
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    pairs = list(zip(order, reversed(order), strict=True))[: min(n, len(rewards) // 2)]
    return [(better, worse) for better, worse in pairs if rewards[better] > rewards[worse]]


def answers(model, reward, prompts, config):
    """(prompt, rewards, texts) of each prompt, its replies sampled at the temperature of training."""
    samples, tokenizer = config["samples"], reward.tokenizer
    size = max(config["batch_size"] // samples, 1)
    progress = Progress(len(prompts), desc="prompts", counted="replies")
    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        sampling = config["max_new_tokens"], config["temperature"], tokenizer.eos_id, config["seed"] + start
        batch = rollout(model, [prompt for prompt in some for _ in range(samples)], *sampling)
        raw = np.where(batch.ended, reward.raw(batch).cpu(), -np.inf).reshape(-1, samples)  # (prompts, samples)
        texts = np.array([tokenizer.decode(reply) for reply in batch.replies], object).reshape(-1, samples)
        yield from zip(some, raw.tolist(), texts.tolist(), strict=True)
        progress.update(start + len(some), len(batch.replies))
    progress.close()


def ranked_rows(model, reward, prompts, config):
    """The rows of all prompts; a reply that never ends is the worst, and empty or equal texts are no pair."""
    rows = []
    for prompt, rewards, texts in answers(model, reward, prompts, config):
        for better, worse in rank_pairs(rewards, config["pairs"]):
            if texts[better].strip() and texts[worse].strip() and texts[better] != texts[worse]:
                rows.append(question_of(reward.tokenizer, prompt) | dict(chosen=texts[better], rejected=texts[worse]))
    return rows


def question_of(tokenizer, prompt):
    """The fields that layout `pairs` reads of a prompt's ids: a prompt, or the messages of several turns."""
    turns = prompt_turns(tokenizer, prompt)
    if len(turns) == 1:
        return dict(prompt=turns[0])
    return dict(messages=[dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)])


def main(argv=None):
    config = parse_config("ranked", argv, __doc__)
    if config["pairs"] > config["samples"] // 2:
        raise ConfigError(f"pairs={config['pairs']}: at most samples / 2 = {config['samples'] // 2} is needed")
    if Path(config["out"]).is_dir() or (Path(config["out"]).exists() and not config["overwrite"]):
        raise ConfigError(f"out={config['out']} exists: choose another, or replace a file with --overwrite")
    check_folder(config["out"])
    env, data = setup(config["device"], "float32", config["seed"]), Path(config["data"])
    ckpt = checkpoint.load(config["ckpt"], training=False)
    if ckpt.model_config["scalar_head"]:
        raise UserError(f"{ckpt.path} is a reward model (stage {ckpt.stage}): ckpt wants a language model")
    tokenizer = checkpoint.tokenizer_of(ckpt)
    checkpoint.check_data(tokenizer, ckpt.path, load_meta(data), data / "meta.json")
    resume.verify_data(data, resume.hashes_of(data, ["prompts.pkl"]))
    reward = Reward(config, ckpt, tokenizer, env)
    room = reward.context, config["max_new_tokens"]
    prompts, _ = load_prompts(data / "prompts.pkl", tokenizer.vocab_size, *room, needed=["training"])
    if reward.function:
        reward.fields = fields_taken(reward.name, reward.function, prompts[0].fields)
    model = checkpoint.build_model(ckpt).to(env.device).eval()
    with checkpoint.naming(ckpt):
        rows = ranked_rows(model, reward, prompts[: config["prompts"]], config)
    if not rows:
        why = "no two replies to a prompt differ in their reward; more samples or a larger max_new_tokens are needed"
        raise UserError(f"{config['ckpt']}: {why}")
    write_rows(config["out"], rows)
    print(f"{config['out']}: {len(rows):,} pairs of replies to {min(config['prompts'], len(prompts)):,} prompts")


if __name__ == "__main__":
    run(main)
