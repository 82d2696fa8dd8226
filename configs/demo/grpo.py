from configs.demo import DATA, FEW_REPLIES, OUT, few
from configs.grpo_train import config as base

config = base | dict(
    data=DATA,
    init_from=f"{OUT}/sft",
    reward_model=f"{OUT}/rm",
    out=f"{OUT}/grpo",
    loss="dr_grpo",  # grpo makes as much of a group's small differences in score as of large ones
    rollout_size=128,
    group_size=8,
    minibatch_size=64,
    micro_batch_size=32,  # of similar length: less padding
    max_steps=64,
    max_new_tokens=80,
    kl_coef=0.025,
    entropy_coef=0.012,  # the reasons for these three are in ppo.py
    score_clip=1.0,
    learning_rate=1.2e-4,
    min_learning_rate=2e-5,
    warmup_steps=2,
    eval_interval=10,
    eval_prompts=64,
    save_interval=20,
    keep_last=1,  # minutes to train again
)
config |= few(**FEW_REPLIES)
