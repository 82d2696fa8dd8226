"""Where the demo's data and runs lie; SMOKE=1 is a trial of the whole chain in few steps, in folders of its own."""

import os

SMOKE = os.environ.get("SMOKE") == "1"
DATA, OUT = ("data/demo_smoke", "out/demo_smoke") if SMOKE else ("data/demo", "out/demo")
FEW_REPLIES = dict(max_steps=4, rollout_size=32, minibatch_size=16, micro_batch_size=16)  # PPO's and GRPO's trial
FEW_REPLIES |= dict(max_new_tokens=40, norm_prompts=32, eval_prompts=8)


def in_smoke(**changes):
    """These changes where SMOKE=1 asks for them, else none."""
    return changes if SMOKE else {}


def few(max_steps=20, **changes):
    """Those of a stage that trains."""
    half = max_steps // 2
    steps = dict(max_steps=max_steps, warmup_steps=2, eval_interval=half, save_interval=half, log_interval=1)
    return in_smoke(**steps | changes)
