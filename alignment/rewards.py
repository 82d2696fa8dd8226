"""What a reply is worth to RL: a reward model's score or a Python function's, in units of the reference's replies.

A policy is validated by it too.
"""

import hashlib

import torch

from alignment.functions import call, fields_taken, file_identity, reward_function
from alignment.rollout import in_batches, rollout, sequence_kl, sequence_scores
from common import checkpoint, distributed, resume
from common.config import ConfigError, UserError, said
from common.metrics import distinct_2
from tokenizer import prompt_turns

LARGEST = 1e30  # reward: weighted by a million and less a mean it still fits float32


def asked(tokenizer, prompt):
    """A prompt as functions get it: its text, several turns a line each."""
    return "\n".join(prompt_turns(tokenizer, prompt))


def checked(name, rewards, n):
    """The rewards as floats, if they are n finite numbers; `name` is what they come from."""
    try:
        if isinstance(rewards, str | bytes | dict | set):
            raise TypeError(f"it is a {type(rewards).__name__}")
        rewards = [number(reward) for reward in rewards]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an element's own code
        raise ConfigError(f"{name} must return a list of numbers: {said(error)}") from None
    if len(rewards) != n:
        raise ConfigError(f"{name} returned {len(rewards)} rewards for {n} replies")
    for i, reward in enumerate(rewards):
        if not abs(reward) <= LARGEST:  # nor is nan
            found = f"{name} returned {reward} for reply {i} of {n}"
            raise ConfigError(f"{found}: it must return finite numbers, of at most {LARGEST:g}")
    return rewards


def number(value):
    """A reward as a float; text is none, though float() reads it."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{value[:40]!r} is text")
    return float(value)


def check_rows(writer, reader):
    """Refuse a checkpoint that cannot read every token which another may write: an embedding padded less."""
    rows, there = (ckpt.model_config["vocab_size"] for ckpt in (writer, reader))
    if there < rows:
        raise UserError(f"{writer.path} may write {rows} different tokens, {reader.path} reads {there} of them only")


def load_reward_model(path, policy):
    """A checkpoint with a scalar head that reads the policy's tokens."""
    ckpt = checkpoint.load(path, training=False)
    checkpoint.refuse_quantized(ckpt)
    if not ckpt.model_config["scalar_head"]:
        raise UserError(f"{ckpt.path} (stage {ckpt.stage}) has no scalar head: reward_model wants a run of rm_train.py")
    if ckpt.tokenizer != policy.tokenizer:
        here, there = (hashlib.sha256(c.tokenizer).hexdigest()[:16] for c in (ckpt, policy))
        raise UserError(f"tokenizer {here} in {ckpt.path}, {there} in {policy.path}: they must be the same")
    check_rows(policy, ckpt)
    return ckpt


def split_reward(name):
    """(whether a reward model is asked, the function's name or "") of "model", "MODULE:FUNCTION" or model+ and that."""
    if name == "model":
        return True, ""
    if name == "model+":
        raise ConfigError("reward=model+: a function is needed after it, MODULE:FUNCTION")
    return name.startswith("model+"), name.removeprefix("model+")


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
    """What the key `reward` says: the model of `reward_model`, a function of texts, which needs none, or their sum.

    `ckpt` is the reward model's checkpoint, `identity` what a resumed run compares of it, and `function_identity` of
    the function's file. `context` is how many tokens of prompt and reply both it and the policy can read.
    """

    def __init__(self, config, policy, tokenizer, env):
        self.config, self.tokenizer, self.env = config, tokenizer, env
        self.ckpt = self.identity = self.function = self.function_identity = self.norm = None
        self.context, self.fields = policy.model_config["max_seq_len"], []
        model, function = split_reward(config["reward"])
        self.name = f"reward={function}"
        if function:
            self.function, module = reward_function(config | dict(reward=function))
            self.function_identity = file_identity(self.function, module)
        if not model:
            return
        self.ckpt = load_reward_model(config["reward_model"], policy)
        self.model_name, self.identity = f"reward_model={self.ckpt.path}", checkpoint.parent_of(self.ckpt)
        context = self.ckpt.model_config["max_seq_len"]
        if context < self.context and env.is_main:
            print(f"{self.model_name} reads {context} tokens of {self.context}: prompts and replies must be as short")
        self.context = min(self.context, context)
        self.model = checkpoint.build_model(self.ckpt).to(env.device).eval().requires_grad_(False)
        distributed.compiled(self.model, env, config)

    def raw(self, batch):
        """In the reward's own unit: (B,)."""
        scores = self.of_model(batch) if self.ckpt else 0
        if not self.function:
            return scores
        return scores + (self.config["rule_weight"] if self.ckpt else 1) * self.of_function(batch)

    def of_model(self, batch):
        """The reward model's scores: (B,)."""
        scores = in_batches(self._score, batch, self.config["micro_batch_size"])
        checked(self.model_name, scores.tolist(), len(scores))
        return scores

    def of_function(self, batch):
        """What the function gives the texts: (B,)."""
        rows = zip(batch.ids.tolist(), batch.lengths.tolist(), batch.replies, strict=True)
        prompts = [asked(self.tokenizer, ids[: length - len(reply)]) for ids, length, reply in rows]
        replies = [self.tokenizer.decode(reply) for reply in batch.replies]
        fields = {name: [row[name] for row in batch.fields] for name in self.fields}
        rewards = checked(self.name, call(self.name, self.function, prompts, replies, fields), len(replies))
        return torch.tensor(rewards, device=batch.device)

    def _score(self, rows):
        with self.env.autocast():
            return score_rows(self.model, rows)

    def start(self, stage, reference, prompts):
        """Take the unit of scores from the run that is resumed, else from the reference's replies to some prompts."""
        if self.ckpt:
            self.ckpt.drop()
        if self.function:
            self.fields = fields_taken(self.name, self.function, prompts[0].fields)
        if stage.resumed:
            self.resume(stage)
            return
        config, eos_id, env = self.config, self.tokenizer.eos_id, self.env
        mine = prompts[env.rank :: env.world_size]
        sampling = config["max_new_tokens"], config["temperature"], eos_id, config["seed"] + env.rank
        self.normalise_on(rollout(reference, mine, *sampling, dtype=env.generation_dtype) if mine else None)

    def resume(self, stage):
        """Take over what `state` gave, and compare the files."""
        self.norm, before = stage.extra["norm"], stage.extra["reward_model"]
        if self.ckpt:
            resume.same_file(stage.resumed, before, self.identity)
            before = stage.extra.get("reward_function")
        now = self.function_identity
        if before and now and before["sha256"] != now["sha256"] and self.env.is_main:
            print(f"{now['path']} has changed since this run began: it goes on with the reward of now")

    @property
    def state(self):
        """What a checkpoint keeps: the unit of scores, and the files that they come from."""
        if self.ckpt and self.function:
            return dict(norm=self.norm, reward_model=self.identity, reward_function=self.function_identity)
        return dict(norm=self.norm, reward_model=self.identity or self.function_identity)

    def normalise_on(self, batch):
        """Take mean and standard deviation from replies of the reference, those of all ranks."""
        raw = distributed.joined(self.raw(batch).tolist() if batch else [], self.env)
        raw = torch.tensor(raw, dtype=torch.float64)
        self.norm = [raw.mean().item(), raw.std().item()]
        if not self.norm[1] > 1e-6 * max(1, abs(self.norm[0])):  # a constant's is rounding, and one reply's is nan
            if self.env.is_main:
                print(f"the reward is {self.norm[0]:.3f} for every reply of the reference: scores are not scaled")
            self.norm[1] = 1.0

    def scores(self, batch):
        """As final_scores: (B,)."""
        raw, config = self.raw(batch), self.config
        return final_scores(raw, batch.ended.to(raw.device), self.norm, config["no_eos_score"], config["score_clip"])


def evaluate_policy(policy, reference, reward, prompts, config):
    """Score, KL, length, eos rate and distinct-2 of replies to held-out prompts, and some of the replies."""
    tokenizer = reward.tokenizer
    sampling = config["max_new_tokens"], config["temperature"], tokenizer.eos_id, config["seed"]
    batch = rollout(policy, prompts, *sampling, dtype=reward.env.generation_dtype)
    texts = [tokenizer.decode(reply) for reply in batch.replies]
    metrics = {
        "val/score": reward.scores(batch).mean().item(),
        "val/kl": sequence_kl(policy, reference, batch, config["temperature"]).mean().item(),
        "val/length": batch.mask.sum(1).mean().item(),
        "val/eos_rate": batch.ended.float().mean().item(),
        "val/distinct_2": distinct_2(texts, sum(map(len, texts))),
    }
    return metrics, [(asked(tokenizer, p), text) for p, text in zip(prompts, texts, strict=True)][:8]
