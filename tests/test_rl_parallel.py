"""PPO and GRPO in two gloo processes: one process on the same replies, and runs that go on where they were killed."""

import shutil

import pytest
import torch
from chains import argv, assert_same_tensors, metrics, rl_options, train_rows
from parallel import ROOT, torchrun

import grpo_train
from common import checkpoint
from common.config import ConfigError
from common.distributed import Env, per_rank

pytestmark = pytest.mark.slow

# A step of each algorithm in float64 on 16 replies that are fixed, of which each process has its part: gradients of
# every update and all metrics. Under RANK-less Python it is the one process.
WORKER = """
import sys, torch
torch.set_default_dtype(torch.float64)
import grpo_train, ppo_train
from tiny import ragged, tiny
from types import SimpleNamespace
from alignment.rewards import Reward
from common import distributed

env = distributed.setup("cpu", "float32", seed=3)
sizes = [(2 + i % 3, 1 + (5 * i) % 11) for i in range(16)]
whole = ragged(*sizes)
whole.ended = torch.arange(16) % 5 > 0
per = 16 // env.world_size
mine = range(env.rank * per, (env.rank + 1) * per)
batch = whole.rows(list(mine))
raw = torch.linspace(-1, 2, 16) ** 2
config = dict(temperature=0.7, max_new_tokens=16, micro_batch_size=3, minibatch_size=16, ppo_epochs=1, epochs=1,
    gamma=0.99, lam=0.9, entropy_coef=0.1, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, group_size=4, kl_coef=0.05,
    no_eos_score=-3.0, score_clip=0.0, parallel="ddp", optimizer="adamw", reward="own:f", norm_prompts=16, seed=1)
words = SimpleNamespace(decode=lambda ids: "".join(chr(0x4E00 + i) for i in ids), eos_id=2)
reward = Reward.__new__(Reward)
reward.config, reward.tokenizer, reward.env = config, words, env
reward.raw = lambda rows: raw[mine.start : mine.stop]
reward.normalise_on(batch)
sampler = lambda *args, dtype: batch
ppo_train.rollout = grpo_train.rollout = sampler
found = dict(norm=reward.norm)
for name in ("ppo", "grpo", "dr_grpo", "rloo"):
    policy, reference, value = tiny(1), tiny(2), tiny(3, scalar_head=True)
    torch.nn.init.normal_(value.scalar.weight)
    trained = [policy, value] if name == "ppo" else [policy]
    wrapped = [distributed.wrap(model, env, config) for model in trained]
    gradients = []

    def clip_and_step(step, loss):
        gradients.append(torch.cat([p.grad.flatten() for model in trained for p in model.parameters()]))
        gradients.append(torch.tensor(loss))
        with torch.no_grad():
            for model in trained:
                for p in model.parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
        return 1.0

    stage = SimpleNamespace(env=env, clip_and_step=clip_and_step)
    for step in range(2):  # the second has ratios other than 1
        order = torch.Generator().manual_seed(0)
        if name == "ppo":
            batch_, fixed, before = ppo_train.experience(policy, reference, value, reward, [], 0.05, 0, config, env)
            if step == 0:
                first = fixed
            after = ppo_train.update(stage, step, *wrapped, batch_, first, config, order)
        else:
            changes = config | dict(loss=name) | (dict(entropy_coef=0) if name == "rloo" else {})
            batch_, *fixed, before = grpo_train.experience(policy, reference, reward, [], 0, changes, env)
            if step == 0:
                first = fixed
            after = grpo_train.update(stage, step, *wrapped, batch_, *first, changes, order)
        found[f"{name} {step}"] = before | after
    found[f"{name} gradients"] = gradients
torch.save(found, f"{sys.argv[1]}/{env.world_size}-{env.rank}.pt")
distributed.cleanup(env)
"""


def test_two_processes_equal_one_on_the_same_replies(tmp_path):
    (tmp_path / "worker.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n{WORKER}")
    for processes in (1, 2):
        torchrun(processes, tmp_path / "worker.py", tmp_path)
    one, two, other = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert one.keys() == two.keys() and one["norm"] == pytest.approx(two["norm"], rel=1e-12)
    for name in ("ppo", "grpo", "dr_grpo", "rloo"):
        for found, expected in zip(two[f"{name} gradients"], one[f"{name} gradients"], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=name)
        assert two[f"{name} gradients"][0].abs().max() > 1e-4
        for step in (0, 1):
            numbers, expected = two[f"{name} {step}"], one[f"{name} {step}"]
            assert numbers == pytest.approx(expected, rel=1e-9, abs=1e-9)
            assert numbers == pytest.approx(other[f"{name} {step}"], rel=1e-12)  # each process knows all
        assert two[f"{name} 1"]["ratio_max"] > 1.001


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_two_processes_resume_to_the_same_run(small, tmp_path, stage):
    changes = dict(max_steps=4, save_interval=2, eval_interval=2)
    changes |= dict(kl_target=0.5) if stage == "ppo" else dict(group_size=2)
    options = {key: x for key, x in rl_options(small, tmp_path / "whole", **changes).items() if x or stage == "ppo"}
    out = torchrun(2, ROOT / f"{stage}_train.py", *argv(**options))
    assert out.count("held-out prompts; reference scores") == 1  # one of them speaks and writes
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    (tmp_path / "halves" / "ckpt-2.pt").replace(tmp_path / "halves" / "ckpt.pt")
    torchrun(2, ROOT / f"{stage}_train.py", *argv(**options | dict(out=tmp_path / "halves", resume=True)))
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    found, expected = (checkpoint.load(tmp_path / name) for name in ("halves", "whole"))
    assert_same_tensors(found.weights, expected.weights)
    if stage == "ppo":
        assert_same_tensors(found.training["extra"].pop("value"), expected.training["extra"].pop("value"))
    assert found.training["extra"] == expected.training["extra"]
    rows = train_rows(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(f"{stage}/score" in row for row in rows)
    if stage == "grpo":  # sizes count over all processes, so that a run may go on in one
        grpo_train.main(argv(**options | dict(resume=True, max_steps=5)))
        assert checkpoint.load(tmp_path / "whole").step == 5


def test_what_processes_cannot_share_is_told(tmp_path):
    two = Env(1, 2, torch.device("cpu"))
    assert per_rank(dict(rollout_size=12), "rollout_size", two, 3) == 6
    with pytest.raises(ConfigError, match="rollout_size=9: 2 processes cannot share it evenly"):
        per_rank(dict(rollout_size=9), "rollout_size", two)
    with pytest.raises(ConfigError, match="rollout_size=12: 2 processes cannot share it evenly, in whole groups of 4"):
        per_rank(dict(rollout_size=12), "rollout_size", two, 4)
    with pytest.raises(ConfigError, match="parallel=fsdp: GRPO trains a copy"):
        grpo_train.main([f"--out={tmp_path}/out", "--parallel=fsdp"])
