"""What the value of a config key may be: one table for all stages, since a key means the same in each of them."""

import os
from typing import Any

LARGEST = 10**12  # where "inf" ends: beyond every use, and a product with a million still fits 64 bits

# Intervals as in mathematics, [0, 1) with 0 and without 1, of keys that are numbers or lists of numbers; "0 or" where 0
# switches something off. stage:key is what a key may be in that stage alone.
RANGES = {
    "[0, inf)": """
        seed max_steps warmup_steps decay_steps pack_len grad_clip top_k compare_samples prompts_val
        eval_generate:eval_tokens quantize:eval_tokens clean.min_characters write_min_characters txt_characters
        people_daily_characters sft_examples.write_asked sft_examples.polarity sft_examples.write reward_length
    """,
    "[1, inf)": """
        eval_interval save_interval log_interval keep_last eval_tokens eval_pairs eval_prompts eval_examples
        calibration_tokens compare_prompts compare_examples unit_bytes min_characters write_max_characters
        rm_max_characters rm_length_bin prompts_train prompts pairs questions
        max_queue max_body max_messages max_characters
    """,
    # what is in memory at once
    "[1, 1e6]": """
        batch_size eval_batch_size grad_accumulation_steps rollout_size minibatch_size micro_batch_size norm_prompts
        ppo_epochs epochs seq_len max_seq_len model.max_seq_len prompts_max_len max_new_tokens eval_new_tokens
        sample_tokens
    """,
    "[2, 1e6]": "grpo_train:group_size samples",  # replies to one prompt are compared
    "[1, 65536]": "model.dim model.n_heads model.n_kv_heads",
    "[1, 1000]": "model.n_layers",
    "(0, 10]": "learning_rate",
    "[0, 10]": "min_learning_rate",
    "[0, 100]": "weight_decay",
    "[0, 5]": "shots",  # what dev of C-Eval and CMMLU holds
    "[0, 1)": "beta1 beta2 momentum model.dropout",
    "[0, 1]": """
        decay_share gamma lam min_p clean.max_broken clean.min_chinese clean.max_repeated_lines clean.max_top_ngram
        clean.max_repeated_ngrams
    """,
    "[0, 0.5)": "label_smoothing",
    "(0, 1)": "val_share held_out",
    "(0, 1]": "top_p compare_top_p",
    "[0, 1e6]": """
        rule_weight kl_coef kl_target entropy_coef vf_coef sft_coef margin centring score_clip damping web_demo:top_k
    """,
    "(0, 1e6]": "cliprange cliprange_value",
    "[0.01, 100]": "temperature embedding_rate",  # log-probabilities at 0 have no value
    "[1e-4, 1e6]": "beta",  # rewards are divided by it
    "(2, 1e6]": "kl_horizon",  # a step multiplies kl_coef by 1 - 2 / kl_horizon at least
    "[-1e6, 1e6]": "no_eos_score",
    "0 or [0.001, 1000]": "eval_generate:temperature compare_temperature",  # 0 is greedy
    "0 or [0.001, 2]": "web_demo:temperature",  # as in OpenAI's interface
    "[0, 65535]": "port",
    "[0.001, 1000]": "repetition_penalty",
    "[0.1, 10]": "web_demo:repetition_penalty",  # as serving/protocol.py has it
    "[0, 1000]": "workers",
    # SentencePiece's own limits; its smallest vocabulary is 3 special, 256 byte and 95 ASCII pieces
    "[354, 1e6]": "vocab_size",
    "[0.98, 1]": "character_coverage",
    "0 or [101, inf)": "input_sentence_size",
    "[16, 65535]": "max_line_bytes",
    "[1, 1024]": "num_threads",
}
CHOICES = {
    "schedule": ("cosine", "wsd"),
    "optimizer": ("adamw", "muon"),
    "dtype": ("auto", "float32", "bfloat16"),  # float16 would need loss scaling
    "export:dtype": (),  # it depends on the format
    "compile": ("auto", True, False),
    "parallel": ("ddp", "fsdp"),
    "logger": ("none", "tensorboard", "swanlab", "wandb"),
    "example_weight": ("token", "example"),
    "dpo_train:loss": ("sigmoid", "ipo", "cdpo"),
    "grpo_train:loss": ("grpo", "dr_grpo", "rloo"),
    "method": ("int8", "int4"),
    "algorithm": ("gptq", "rtn"),
    "quantize:group_size": (32, 64, 128),
    "calibration": ("train", "sft.pkl"),
    "dedup": ("none", "exact", "near"),
    "hub": ("huggingface", "modelscope"),
    "scoring": ("letter", "text"),
    "parts": ("text", "pretrain", "sft", "rm", "prompts"),
}
# keys that name what is read or written: an empty name, or one of blanks, would mean the current directory
NAMES = "out data init_from ckpt tokenizer reward_model import_hf import_llama2c compare documents decontaminate input"
NAMES = dict.fromkeys(NAMES.split(), "a file or folder")
NAMES |= dict(
    out="a folder", runs="a folder", report="a .md file", picture="a .png file", reward="a reward", judge="a function"
)
# keys of what is read, for messages about a file that is not there
INPUTS = {*NAMES, "sources", "positive", "negative", "people_daily"} - {"out", "report", "picture", "reward", "judge"}
# another key's value
AT_MOST = dict(
    min_learning_rate="learning_rate",
    write_min_characters="write_max_characters",
    minibatch_size="rollout_size",
)
INTERVALS = {key: interval for interval, keys in RANGES.items() for key in keys.split()}


def range_of(stage: str, key: str) -> tuple | str | None:
    """What a flat key may be in a stage: a tuple of choices, an interval, or None where everything of its type goes."""
    for table in (CHOICES, INTERVALS):
        for name in (f"{stage}:{key}", key):
            if name in table:
                return table[name] or None
    return None


def fault(stage: str, key: str, value: Any) -> str | None:
    """What is needed instead of this value of a flat key; None where it is right."""
    values = value if isinstance(value, list | tuple) else [value]
    if key in NAMES and any(isinstance(each, str) and not each.strip() for each in values):
        return f"the name of {NAMES[key]} is needed"
    if not all(map(_sayable, values)):
        return "text without NUL and halves of surrogate pairs is needed"
    allowed = range_of(stage, key)
    if allowed is None:
        return None
    right = _chosen if isinstance(allowed, tuple) else _inside
    wrong = [each for each in values if not right(allowed, each)]
    return _needed(allowed, wrong[0]) if wrong else None


def contradiction(config: dict) -> str | None:
    """A line about the first two values of a flat config that exclude each other; None where there are none."""
    for low, high in AT_MOST.items():
        if low in config and config[low] > config[high]:
            return f"{low}={config[low]}: at most {high}={config[high]} is needed"
    if 0 < config.get("decay_steps", 0) < config.get("warmup_steps", 0):
        return f"decay_steps={config['decay_steps']}: 0 or at least warmup_steps={config['warmup_steps']} is needed"
    return None


def _sayable(value):
    """Whether it could be an argument of a command, or a file's name, if it is text."""
    try:
        return not isinstance(value, str) or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _chosen(choices, value):
    return (type(value), value) in [(type(choice), choice) for choice in choices]  # 1 is not True here


def _bounds(interval):
    """("0" or "", low, high) of an interval."""
    zero, _, pair = interval.rpartition(" or ")
    low, high = map(float, pair[1:-1].split(","))
    return zero, low, min(high, LARGEST)


def _inside(interval, value):
    zero, low, high = _bounds(interval)
    above = value >= low if "[" in interval else value > low
    below = value <= high if "]" in interval else value < high
    return (above and below) or (zero == "0" and value == 0)


def _needed(allowed, wrong):
    """The words for it. An upper end that nobody comes near is left out, unless that is what is wrong."""
    if isinstance(allowed, tuple):
        *most, last = (str(each).lower() for each in allowed)
        return f"{', '.join(most)} or {last} is needed"
    zero, low, high = _bounds(allowed)
    words = f"{'0 or ' if zero else ''}{'at least' if '[' in allowed else 'more than'} {low:,.13g}"
    if high < 1e6 or wrong >= high:
        words += f" and {'at most' if ']' in allowed else 'less than'} {high:,.13g}"
    return f"{words} is needed"
