"""What the configs of a recipe share, for the corpora and the size that runs/recipe.sh names in the environment.

RECIPE=general SIZE=24m python pretrain.py configs/recipes/pretrain.py --plan
"""

import os

from configs.sizes import sizes

SOURCES = dict(  # by recipe, names of `python data_process.py --list_sources`
    general=["wikipedia", "baike", "zhihu", "pretrain_zh", "belle", "firefly", "zhihu_rlhf", "hh_rlhf_cn", "rlhf_zh"],
    novels=["webnovel", "belle", "firefly", "zhihu_rlhf", "rlhf_zh"],
)
# Of each size: rows in memory at once, which fit 16 GB; rows in a step of pretraining, 65,536 to 262,144 tokens; steps,
# in which 9m sees 477 tokens a parameter and 256m 70: what is small is cheap to train for longer.
AT_ONCE = {"9m": 128, "24m": 128, "58m": 64, "134m": 32, "256m": 16}
ROWS = {"9m": 128, "24m": 128, "58m": 256, "134m": 256, "256m": 256}
STEPS = {"9m": 32_000, "24m": 64_000, "58m": 64_000, "134m": 96_000, "256m": 72_000}


def said(name, default, choices):
    """A variable of the environment that is one of some words; ValueError for another."""
    value = os.environ.get(name) or default
    if value not in choices:
        raise ValueError(f"{name}={value}: one of {', '.join(choices)} is needed")
    return value


RECIPE, SIZE = said("RECIPE", "general", SOURCES), said("SIZE", "24m", AT_ONCE)
SMOKE = said("SMOKE", "0", ("0", "1")) == "1"
POWERS = ("1", "2", "4", "8", "16")
SPLIT = int(said("SPLIT", "1", POWERS))  # so many times fewer rows at once, in as many more turns: the same steps
PROCESSES = int(said("WORLD_SIZE", "1", POWERS))  # of torchrun

VOCAB = os.environ.get("VOCAB") or ("2048" if SMOKE and not os.environ.get("TOKENIZER") else "")  # of one trained here
if VOCAB and not VOCAB.isdecimal():
    raise ValueError(f"VOCAB={VOCAB}: a number of pieces is needed, as 32000")
FAMILY = "-".join(filter(None, (RECIPE, VOCAB, "smoke" if SMOKE else "")))  # its sizes share data and vocabulary
DATA, OUT = f"data/{FAMILY}", f"out/{FAMILY}-{SIZE}"
TOKENIZER = f"out/{FAMILY}/tokenizer" if VOCAB else os.environ.get("TOKENIZER") or "THUDM/chatglm3-6b"
SAMPLES = f"{DATA}/samples"  # of corpora.samples, for SMOKE=1

MODEL = sizes[f"tiny-llama2-{SIZE}"]
WIDER = MODEL["dim"] / 512  # than the model of the stages' defaults: learning rates are divided by it
if SMOKE:
    MODEL = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4 * MODEL["n_kv_heads"] // MODEL["n_heads"], max_seq_len=128)


def batches(rows, at_once):
    """{batch_size, grad_accumulation_steps} of a step of `rows` rows, the same whatever the processes and SPLIT.

    at_once: the most in memory of a process, before SPLIT. All are powers of two.
    """
    rows = 8 if SMOKE else rows // PROCESSES
    at_once = 4 if SMOKE else min(rows, max(1, at_once // SPLIT))
    return dict(batch_size=at_once, grad_accumulation_steps=rows // at_once)


def replies_at_once(config, at_once):
    """micro_batch_size of PPO and GRPO, whose steps do not depend on it."""
    return batches(config["minibatch_size"], at_once)["batch_size"]


def in_smoke(**changes):
    """These changes where SMOKE=1 asks for a trial of the whole recipe in minutes, else none."""
    return changes if SMOKE else {}


def few(**changes):
    """Those of a stage that trains: a few steps."""
    return in_smoke(**dict(max_steps=4, warmup_steps=1, eval_interval=4, save_interval=2, log_interval=1) | changes)


def few_replies(**changes):
    """Those of PPO and GRPO."""
    sizes = dict(rollout_size=8, minibatch_size=4, max_new_tokens=16, norm_prompts=8, eval_prompts=4)
    return few(**dict(max_steps=2, eval_interval=2, save_interval=1) | sizes | changes)
