from configs.demo import DATA, FEW_REPLIES, OUT, few
from configs.ppo_train import config as base

config = base | dict(
    data=DATA,
    init_from=f"{OUT}/sft",
    reward_model=f"{OUT}/rm",
    out=f"{OUT}/ppo",
    rollout_size=128,
    minibatch_size=64,
    micro_batch_size=32,  # of similar length: less padding
    max_steps=36,
    max_new_tokens=80,
    kl_coef=0.025,  # a smaller one makes more replies positive, and all of them more alike
    entropy_coef=0.03,  # which this prevents, at a price in KL
    score_clip=1.0,  # a reply that is surely positive is enough; without it the same share costs more variety
    lam=1.0,  # the score comes last; with 0.95 the first of 40 tokens gets 0.95^40 = 13 % of it directly
    learning_rate=1e-4,
    min_learning_rate=2e-5,
    warmup_steps=2,
    eval_interval=10,
    eval_prompts=64,
    save_interval=20,
    keep_last=1,  # minutes to train again
)
config |= few(**FEW_REPLIES)
