from configs.ppo_train import config as base
from configs.recipes import AT_ONCE, DATA, OUT, SIZE, WIDER, few_replies, replies_at_once

recipe = dict(
    data=DATA,
    init_from=f"{OUT}/sft",
    reward_model=f"{OUT}/rm",
    out=f"{OUT}/ppo",
    micro_batch_size=replies_at_once(base, AT_ONCE[SIZE] // 2),  # a policy and a value model learn
    max_new_tokens=256,
    score_clip=1.0,  # these two as in configs/demo/ppo.py
    lam=1.0,
    learning_rate=base["learning_rate"] / WIDER,
    min_learning_rate=base["min_learning_rate"] / WIDER,
)
config = base | recipe | few_replies()
