"""A chain of stages in miniature through the real scripts: corpora, options, runs and what two runs have in common."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data_process
import dpo_train
import ppo_train
import pretrain
import quantize
import rm_train
import sft
import tokenizer.train
from common import checkpoint
from common.config import run
from common.stage import Stage
from model import Llama, ModelConfig
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
STEPS, HALF = 6, 3
MAINS = dict(pretrain=pretrain, sft=sft, rm=rm_train, dpo=dpo_train, ppo=ppo_train, quantize=quantize)
TRAINED = ["pretrain", "sft", "rm", "dpo", "ppo"]
PARENTS = dict(pretrain=None, sft="pretrain", rm="sft", dpo="sft", ppo="sft", quantize="ppo")
RUN = dict(max_steps=STEPS, warmup_steps=2, eval_interval=100, save_interval=100, log_interval=1, device="cpu")
OPTIONS = dict(
    pretrain=RUN
    | {f"model.{key}": size for key, size in dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64).items()}
    | dict(seq_len=32, batch_size=8, grad_accumulation_steps=1, learning_rate=0.01)
    | dict(sample_prompts="酒店,这本书", sample_tokens=8),
    sft=RUN
    | dict(batch_size=4, grad_accumulation_steps=2, learning_rate=0.01, example_weight="example")
    | dict(eval_examples=16, eval_prompts=8, eval_new_tokens=8),
    rm=RUN | dict(batch_size=8, learning_rate=0.01),
    dpo=RUN
    | dict(batch_size=4, grad_accumulation_steps=2, learning_rate=0.003)
    | dict(eval_pairs=16, eval_prompts=4, eval_new_tokens=8),
    ppo=RUN
    | dict(rollout_size=8, minibatch_size=4, micro_batch_size=2, max_new_tokens=8, learning_rate=0.003)
    | dict(norm_prompts=8, eval_prompts=4, kl_target=0.5, temperature=0.7),
    quantize=dict(eval_tokens=0, sample_prompts="写一条酒店好评。", sample_tokens=8, device="cpu"),
)


def write_corpora(folder):
    """150 positive and 150 negative reviews of three kinds, and newspaper lines in word/tag form."""
    subjects = ["酒店的房间", "宾馆的早餐", "这本小说", "作者的故事", "电脑的键盘", "笔记本的屏幕"]
    degrees = ["很", "非常", "真的", "确实", "总是"]
    verdicts = dict(
        positive=["好，推荐大家。", "棒！下次还来", "让人满意，值得。", "不错，我很喜欢。", "超出期望！"],
        negative=["差，不推荐。", "糟！再也不来", "让人失望，不值。", "没意思，我后悔了。", "不如期望！"],
    )
    for name, endings in verdicts.items():
        lines = [subject + degree + ending for subject in subjects for degree in degrees for ending in endings]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    paper = [f"19980101-01-001-{i:03}/m  第{i}/m  条/q  [人民/n  日报/n]nt  新闻/n  。/w" for i in range(40)]
    (folder / "paper.txt").write_text("\n".join(paper) + "\n", encoding="utf-8")


def argv(**options):
    return [f"--{key}={value}" for key, value in options.items()]


def data_options(folder, out, tokenizer_path):
    corpora = dict(positive="positive.txt", negative="negative.txt", people_daily="paper.txt")
    options = {key: folder / name for key, name in corpora.items()} | dict(out=out, tokenizer=tokenizer_path)
    return options | dict(val_share=0.2, max_seq_len=64, rm_length_bin=8, prompts_train=24, prompts_val=8)


def make_data(folder, parts):
    """Corpora, a tokenizer of 540 pieces and the data of some parts, in `folder`."""
    write_corpora(folder)
    data = data_options(folder, folder / "data", folder / "tokenizer")
    data_process.main(argv(**data, parts="text"))
    tokenizer.train.main(argv(input=folder / "data" / "corpus.txt", vocab_size=540, out=folder / "tokenizer"))
    data_process.main(argv(**data, parts=parts))


def make_model(folder, stage, seed=0, **changes):
    """A checkpoint of that stage that knows nothing yet, for the tokenizer in `folder`."""
    vocabulary = Tokenizer.load(folder / "tokenizer")
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64, vocab_size=vocabulary.vocab_size)
    model = Llama(ModelConfig(**shape | changes))
    if model.scalar is not None:
        torch.nn.init.normal_(model.scalar.weight)
    (folder / stage).mkdir()
    facts = dict(stage=stage, step=0, tokens_seen=0, config={}, tokenizer=vocabulary.model_bytes)
    checkpoint.save(folder / stage, model=model, **facts)


def options_of(folder, stage, out, changes):
    """What a stage of the chain in `folder` is called with; its run goes to `out`."""
    options = OPTIONS[stage] | dict(data=folder / "data", out=out)
    if stage == "pretrain":
        options["tokenizer"] = folder / "tokenizer"
    else:
        options["init_from"] = folder / PARENTS[stage]
    if stage == "ppo":
        options["reward_model"] = folder / "rm"
    return argv(**options | changes)


def train(folder, stage, out, **changes):
    MAINS[stage].main(options_of(folder, stage, out, changes))


def metrics(run_dir):
    """The rows of metrics.jsonl without the seconds."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def losses(run_dir):
    return [row["train/loss"] for row in metrics(run_dir) if "train/loss" in row]


def train_rows(run_dir):
    return [row for row in metrics(run_dir) if "train/tokens" in row]


def assert_same_run(run_dir, expected_dir):
    """Metrics, samples and weights are equal to the last bit."""
    assert metrics(run_dir) == metrics(expected_dir)
    samples, expected_samples = run_dir / "samples.txt", expected_dir / "samples.txt"
    assert samples.exists() == expected_samples.exists()
    assert not samples.exists() or samples.read_bytes() == expected_samples.read_bytes()
    found, expected = checkpoint.load(run_dir), checkpoint.load(expected_dir)
    assert (found.step, found.tokens_seen) == (STEPS, expected.tokens_seen)
    assert_same_tensors(found.weights, expected.weights)
    extra, expected_extra = found.training["extra"], expected.training["extra"]
    if expected_extra:
        assert_same_tensors(extra.pop("value"), expected_extra.pop("value"))
    assert extra == expected_extra


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def act_after(patch, step, action):
    """Call action(stage) once that step is done and logged."""
    log = Stage.log

    def log_and_act(self, done, *args, **kwargs):
        log(self, done, *args, **kwargs)
        if done == step:
            action(self)

    patch.setattr(Stage, "log", log_and_act)


def press_ctrl_c(_):
    signal.raise_signal(signal.SIGINT)


def train_in_two_sittings(chain, stage, out, capsys, **changes):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        act_after(patch, HALF, press_ctrl_c)
        train(chain, stage, out, **changes)
    assert stopped.value.code == 130
    assert f"--resume goes on from {out}" in capsys.readouterr().out
    saved = checkpoint.load(out)
    assert saved.step == HALF
    torch.manual_seed(12345)  # a new process would not have this one's random state
    train(chain, stage, out, resume=True, **changes)


def start(*command):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def failure(capsys, main, options):
    """The one line on stderr with which a script ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main(options))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " units " not in line]  # but for progress
    assert line.startswith("error: ")
    return line


def rl_options(small, out, **changes):
    options = OPTIONS["ppo"] | dict(data=small / "data", init_from=small / "sft", reward_model=small / "rm", out=out)
    return options | dict(kl_target=0.0, max_steps=2, max_new_tokens=12) | changes
