from configs.grpo_train import config as base

config = base | dict(
    data="data/demo",
    init_from="out/demo/sft",
    reward_model="out/demo/rm",
    out="out/demo/grpo",
    rollout_size=64,
    group_size=8,
    minibatch_size=32,
    max_steps=40,
    max_new_tokens=80,
    kl_coef=0.12,  # as in ppo.py
    learning_rate=1e-4,
    min_learning_rate=2e-5,
    warmup_steps=2,
    eval_interval=10,
    eval_prompts=64,
    save_interval=20,
    keep_last=1,  # minutes to train again
)
