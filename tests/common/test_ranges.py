"""Every number of every config has a range that holds its default; a value outside it is refused in one line."""

import importlib
import math

import pytest
from chains import ROOT, failure

from common.config import ConfigError, flatten, parse_config
from common.distributed import DTYPES
from common.ranges import CHOICES, INTERVALS, LARGEST, fault, range_of
from corpora.hub import HUBS
from corpora.records import STREAMS
from lowbit.layers import GROUP_SIZES

STAGES = sorted(path.stem for path in ROOT.glob("configs/[!_]*.py") if path.stem != "sizes")
DEMO = dict(data="data_process", dpo="dpo_train", grpo="grpo_train", ppo="ppo_train", rm="rm_train")
DEFAULTS = {stage: flatten(importlib.import_module(f"configs.{stage}").config) for stage in STAGES}


def numbers(stage):
    """{key: default} of the keys that are numbers, or lists of them."""
    firsts = {key: value[0] if isinstance(value, list) and value else value for key, value in DEFAULTS[stage].items()}
    return {key: DEFAULTS[stage][key] for key, value in firsts.items() if type(value) in (int, float)}


INTERVAL_KEYS = [(stage, key) for stage in STAGES for key in numbers(stage) if isinstance(range_of(stage, key), str)]
CHOICE_KEYS = [(stage, key) for stage in STAGES for key in DEFAULTS[stage] if isinstance(range_of(stage, key), tuple)]


def option(stage, key, value):
    """--key=value; in a list of numbers all are this one."""
    default = DEFAULTS[stage][key]
    return f"--{key}={','.join([str(value)] * len(default)) if isinstance(default, list) else value}"


def refused(stage, key, value):
    with pytest.raises(ConfigError) as caught:
        parse_config(stage, [option(stage, key, value)], "")
    line = str(caught.value)
    assert line.removeprefix("--").startswith(f"{key}=") and "\n" not in line
    return line


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_has_a_range(stage):
    assert [key for key in numbers(stage) if range_of(stage, key) is None] == []


def test_every_range_is_of_a_key():
    keys = {name for stage in STAGES for key in DEFAULTS[stage] for name in (key, f"{stage}:{key}")}
    assert sorted((INTERVALS | CHOICES).keys() - keys) == []


@pytest.mark.parametrize("path", [*STAGES, *(path.stem for path in ROOT.glob("configs/demo/[!_]*.py"))])
def test_defaults_are_inside(path):
    stage = DEMO.get(path, path)
    names = [f"configs.{stage}"] + ([f"configs.demo.{path}"] if (ROOT / f"configs/demo/{path}.py").exists() else [])
    for name in names:
        config = flatten(importlib.import_module(name).config)
        assert {key: fault(stage, key, value) for key, value in config.items() if fault(stage, key, value)} == {}


@pytest.mark.parametrize(("stage", "key"), INTERVAL_KEYS)
def test_numbers_outside_are_refused_and_the_ends_that_belong_are_not(stage, key):
    interval = range_of(stage, key).removeprefix("0 or ")
    low, high = (min(float(end), LARGEST) for end in interval[1:-1].split(","))
    default = numbers(stage)[key]
    whole = isinstance(default[0] if isinstance(default, list) else default, int)
    step = (lambda x, way: int(x) + way) if whole else (lambda x, way: math.nextafter(x, way * math.inf))
    outside = [step(low, -1) if interval[0] == "[" else low, step(high, 1) if interval[-1] == "]" else high]
    for value in [*outside, -LARGEST, 10 * LARGEST, "9" * 400, "inf", "-inf", "nan", "1e999", ""]:
        if value != 0 or not range_of(stage, key).startswith("0 or"):
            refused(stage, key, int(value) if whole and isinstance(value, float) else value)
    inside = [low if interval[0] == "[" else step(low, 1), high if interval[-1] == "]" else step(high, -1)]
    for value in inside:
        assert fault(stage, key, int(value) if whole else value) is None
    if not whole:
        assert fault(stage, key, math.nan)


@pytest.mark.parametrize(("stage", "key"), CHOICE_KEYS)
def test_choices(stage, key):
    choices = range_of(stage, key)
    for choice in choices:
        assert fault(stage, key, choice) is None
    assert fault(stage, key, 48 if isinstance(choices[0], int) else "neither").endswith(
        f" or {str(choices[-1]).lower()} is needed"
    )


def test_what_a_choice_names_is_there():
    assert set(CHOICES["hub"]) == set(HUBS)
    assert set(CHOICES["parts"]) == set(STREAMS)
    assert CHOICES["quantize:group_size"] == tuple(GROUP_SIZES)
    assert set(CHOICES["dtype"]) == {"auto", *DTYPES}


@pytest.mark.parametrize(
    ("stage", "value", "line"),
    [
        ("sft", "--max_steps=-5", "max_steps=-5: at least 0 is needed"),
        ("sft", "--eval_new_tokens=0", "eval_new_tokens=0: at least 1 is needed"),
        ("sft", "--beta1=1.5", "beta1=1.5: at least 0 and less than 1 is needed"),
        ("sft", "--grad_clip=1e300", "grad_clip=1e+300: at least 0 and less than 1,000,000,000,000 is needed"),
        ("sft", "--out=", "out=: the name of a folder is needed"),
        ("sft", "--batch_size=10000000", "batch_size=10000000: at least 1 and at most 1,000,000 is needed"),
        ("sft", "--learning_rate=1e-7", "min_learning_rate=2e-05: at most learning_rate=1e-07 is needed"),
        ("sft", "--schedule=linear", "schedule=linear: cosine or wsd is needed"),
        ("ppo_train", "--temperature=0", "temperature=0.0: at least 0.01 and at most 100 is needed"),
        ("ppo_train", "--kl_horizon=0", "kl_horizon=0.0: more than 2 is needed"),
        ("ppo_train", "--rollout_size=16", "minibatch_size=32: at most rollout_size=16 is needed"),
        ("pretrain", "--decay_steps=100", "decay_steps=100: 0 or at least warmup_steps=500 is needed"),
        ("dpo_train", "--beta=0", "beta=0.0: at least 0.0001 is needed"),
        ("eval_generate", "--temperature=1e-9", "temperature=1e-09: 0 or at least 0.001 and at most 1,000 is needed"),
        ("quantize", "--group_size=48", "group_size=48: 32, 64 or 128 is needed"),
        ("tokenizer", "--input_sentence_size=9", "input_sentence_size=9: 0 or at least 101 is needed"),
    ],
)
def test_the_line_says_what_is_needed(stage, value, line):
    with pytest.raises(ConfigError) as caught:
        parse_config(stage, [value], "")
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("tokenizer.train", "--vocab_size=-1"),
        ("data_process", "--val_share=1"),
        ("pretrain", "--model.dim=0"),
        ("sft", "--grad_clip=-1"),
        ("rm_train", "--seed=-1"),
        ("dpo_train", "--beta=0"),
        ("ppo_train", "--ppo_epochs=0"),
        ("grpo_train", "--temperature=0"),
        ("quantize", "--damping=inf"),
        ("eval_generate", "--top_p=0"),
        ("export", "--format=gguf --dtype=int3"),
    ],
)
def test_every_script_refuses_before_it_reads_or_writes(script, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*option.split(), *([] if script == "eval_generate" else ["--out=made"])]
    line = failure(capsys, importlib.import_module(script).main, options)
    assert option.split()[-1].removeprefix("--").split("=")[0] + "=" in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    [
        "data=\n",
        "init_from=",
        "reward_model= ",
        "tokenizer=",
        "report=",
        "judge=",
        "out=\t",
        "compare=a,",
        "documents=,",
        "decontaminate=a, ,b",
    ],
)
def test_an_empty_name_is_refused_by_its_key(option):
    key = option.partition("=")[0]
    stage = next(stage for stage in STAGES if key in DEFAULTS[stage])
    with pytest.raises(ConfigError, match=f"^{key}=.*: the name of a") as caught:
        parse_config(stage, [f"--{option}"], "")
    assert key != "report" or str(caught.value) == "report=: the name of a .md file is needed"
