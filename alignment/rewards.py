"""What a reply is worth to RL: a reward model's score or a Python function's, in units of the reference's replies.

A policy is validated by it too.
"""

import hashlib
import importlib
import inspect
import math
from functools import partial

import torch

from alignment.rollout import in_batches, rollout, sequence_kl, sequence_scores
from common import checkpoint
from common.config import ConfigError, UserError
from common.metrics import distinct_2


def length_reward(prompts, replies, lo, hi):
    """1 for a reply of lo to hi characters, falling linearly to 0 at no characters and at twice hi."""
    return [max(0.0, min(1.0, len(reply) / max(lo, 1), 2 - len(reply) / hi)) for reply in replies]


def reward_function(config):
    """f(prompts, replies, **fields) -> rewards, all lists: what `reward` names, "length" or "module:function"."""
    name = config["reward"]
    if name == "length":
        bounds = config["reward_length"]
        if len(bounds) != 2 or not bounds[0] <= bounds[1] or bounds[1] < 1:
            raise ConfigError(f"reward_length={bounds}: the shortest and the longest reply in characters are needed")
        return lambda prompts, replies: length_reward(prompts, replies, *bounds)
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(f"reward={name}: model, length or module:function is needed")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"reward={name}: cannot import {module_name}: {error}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"reward={name}: {module.__file__} has no function {function_name}")
    return function


def fields_taken(name, function, fields):
    """Which of the prompts' fields a reward function gets: those it has a parameter of that name for, or with **, all.

    The first two parameters are the prompts and the replies; a field of their names is left out, in a line. Raises
    ConfigError where it needs one that the prompts do not have.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some that are written in C
        return []
    rest = {p.name: p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for p in rest.values():
        if p.default is p.empty and p.name not in fields:
            has = ", ".join(fields) or "none"
            raise ConfigError(f"reward={name} needs the field {p.name} of the prompts, which have {has}")
    taken = list(fields) if any(p.kind is p.VAR_KEYWORD for p in parameters) else [n for n in fields if n in rest]
    clashes = [p.name for p in parameters[:2] if p.name in taken]
    if clashes:
        print(f"reward={name}: not passed, as its own parameters have these names: {', '.join(clashes)} of the prompts")
    return [field for field in taken if field not in clashes]


def checked(name, rewards, n):
    """The rewards as floats, if they are n finite numbers."""
    try:
        rewards = [float(reward) for reward in rewards]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward={name} must return a list of numbers: {error}") from None
    if len(rewards) != n:
        raise ConfigError(f"reward={name} returned {len(rewards)} rewards for {n} replies")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ConfigError(f"reward={name} returned {reward} for reply {i} of {n}: finite numbers are needed")
    return rewards


def load_reward_model(path, policy):
    """A checkpoint with a scalar head that reads the policy's tokens."""
    ckpt = checkpoint.load(path)
    checkpoint.refuse_quantized(ckpt)
    if not ckpt.model_config["scalar_head"]:
        raise UserError(f"{ckpt.path} (stage {ckpt.stage}) has no scalar head: reward_model wants a run of rm_train.py")
    if ckpt.tokenizer != policy.tokenizer:
        here, there = (hashlib.sha256(c.tokenizer).hexdigest()[:16] for c in (ckpt, policy))
        raise UserError(f"tokenizer {here} in {ckpt.path}, {there} in {policy.path}: they must be the same")
    return ckpt


def score_rows(reward_model, rows):
    return sequence_scores(reward_model, rows.ids, rows.lengths)


def final_scores(raw_scores, ended, norm, no_eos_score, score_clip=0.0):
    """Scores in standard deviations of the reference's, from -score_clip to score_clip unless that is 0: (B,).

    Replies without <eos> get no_eos_score.
    """
    mean, std = norm
    bound = score_clip or torch.inf
    scores = ((raw_scores - mean) / std).clamp(-bound, bound)
    return torch.where(ended, scores, torch.full_like(scores, no_eos_score))


class Reward:
    """What the key `reward` says: the model of `reward_model`, or a function of texts, which needs none.

    `ckpt` is the reward model's checkpoint and `identity` what a resumed run compares of it; None with a function.
    `context` is how many tokens of prompt and reply both it and the policy can read.
    """

    def __init__(self, config, policy, tokenizer, device):
        self.config, self.tokenizer = config, tokenizer
        self.ckpt = self.identity = self.norm = None
        self.context, self.fields = policy.model_config["max_seq_len"], []
        if config["reward"] != "model":
            self.function = reward_function(config)
            return
        self.ckpt = load_reward_model(config["reward_model"], policy)
        self.identity = checkpoint.parent_of(self.ckpt)
        self.context = min(self.context, self.ckpt.model_config["max_seq_len"])
        self.model = checkpoint.build_model(self.ckpt).to(device).eval().requires_grad_(False)

    def raw(self, batch):
        """In the reward's own unit: (B,)."""
        if self.ckpt:
            return in_batches(partial(score_rows, self.model), batch, self.config["micro_batch_size"])
        rows = zip(batch.ids.tolist(), batch.lengths.tolist(), batch.replies, strict=True)
        prompts = [self.tokenizer.decode(ids[: length - len(reply)]) for ids, length, reply in rows]
        replies = [self.tokenizer.decode(reply) for reply in batch.replies]
        fields = {name: [row[name] for row in batch.fields] for name in self.fields}
        rewards = checked(self.config["reward"], self.function(prompts, replies, **fields), len(replies))
        return torch.tensor(rewards, device=batch.ids.device)

    def start(self, stage, reference, prompts):
        """Take the unit of scores from the run that is resumed, else from the reference's replies to some prompts."""
        if not self.ckpt:
            self.fields = fields_taken(self.config["reward"], self.function, prompts[0].fields)
        if stage.resumed:
            checkpoint.same_file(stage.resumed, stage.extra["reward_model"], self.identity)
            self.norm = stage.extra["norm"]
        else:
            config, eos_id = self.config, self.tokenizer.eos_id
            replies = rollout(
                reference, prompts, config["max_new_tokens"], config["temperature"], eos_id, config["seed"]
            )
            self.normalise_on(replies)

    def normalise_on(self, batch):
        """Take mean and standard deviation from replies of the reference."""
        raw = self.raw(batch)
        self.norm = [raw.mean().item(), raw.std().item()]
        if not self.norm[1] > 1e-6 * max(1, abs(self.norm[0])):  # a constant's is rounding, and one reply's is nan
            print(f"the reward is {self.norm[0]:.3f} for every reply of the reference: scores are not scaled")
            self.norm[1] = 1.0

    def scores(self, batch):
        """As final_scores: (B,)."""
        no_eos_score, score_clip = self.config["no_eos_score"], self.config["score_clip"]
        return final_scores(self.raw(batch), batch.ended, self.norm, no_eos_score, score_clip)


def evaluate_policy(policy, reference, reward, prompts, config):
    """Score, KL, length, eos rate and distinct-2 of replies to held-out prompts, and some of the replies."""
    tokenizer = reward.tokenizer
    batch = rollout(policy, prompts, config["max_new_tokens"], config["temperature"], tokenizer.eos_id, config["seed"])
    texts = [tokenizer.decode(reply) for reply in batch.replies]
    metrics = {
        "val/score": reward.scores(batch).mean().item(),
        "val/kl": sequence_kl(policy, reference, batch, config["temperature"]).mean().item(),
        "val/length": batch.mask.sum(1).mean().item(),
        "val/eos_rate": batch.ended.float().mean().item(),
        "val/distinct_2": distinct_2(texts, sum(map(len, texts))),
    }
    return metrics, [(tokenizer.decode(p), text) for p, text in zip(prompts, texts, strict=True)][:8]
