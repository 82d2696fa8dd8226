from configs.grpo_train import config as base

config = base | dict(
    data="data/poems",
    init_from="out/poems/sft",
    reward="verse.rewards:rules",
    out="out/poems/grpo",
    loss="dr_grpo",  # grpo makes as much of a group's small differences in score as of large ones
    rollout_size=128,
    group_size=4,  # more prompts a step: what is learnt of one rhyme must not drown the others
    epochs=2,
    minibatch_size=32,
    micro_batch_size=32,
    max_steps=160,
    max_new_tokens=40,
    temperature=0.8,  # as in use: at 1 a slip of a few characters in each poem drowns what the rules say
    kl_coef=0.01,
    entropy_coef=0.0005,  # 0.002 keeps more variety and rhymes less (docs/poems.md)
    learning_rate=2e-4,
    min_learning_rate=1e-5,  # what a group says of a token is mostly noise: only small steps average it out
    warmup_steps=2,
    eval_interval=50,
    eval_prompts=64,
    save_interval=50,
    keep_last=1,  # minutes to train again
)
