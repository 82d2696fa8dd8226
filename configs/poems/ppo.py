from configs.ppo_train import config as base

config = base | dict(
    data="data/poems",
    init_from="out/poems/sft",
    reward="model+verse.rewards:rules",
    reward_model="out/poems/rm",
    rule_weight=6.0,
    out="out/poems/ppo",
    rollout_size=128,
    minibatch_size=32,
    micro_batch_size=32,
    max_steps=100,
    max_new_tokens=40,
    temperature=0.8,  # as in grpo.py
    kl_coef=0.01,
    entropy_coef=0.005,
    lam=1.0,  # the score comes last; with 0.95 the first of 40 tokens gets 0.95^40 = 13 % of it directly
    learning_rate=2e-4,
    min_learning_rate=1e-5,  # as in grpo.py
    warmup_steps=2,
    eval_interval=25,
    eval_prompts=64,
    save_interval=25,
    keep_last=1,  # minutes to train again
)
