from configs.dpo_train import config as base
from configs.recipes import AT_ONCE, DATA, OUT, SIZE, WIDER, batches, few

recipe = dict(
    data=DATA,
    init_from=f"{OUT}/sft",
    out=f"{OUT}/dpo",
    learning_rate=base["learning_rate"] / WIDER,
    min_learning_rate=base["min_learning_rate"] / WIDER,
    eval_new_tokens=256,
)
config = base | recipe | batches(32, AT_ONCE[SIZE] // 2)  # a pair has two rows
config |= few(eval_pairs=16, eval_prompts=4, eval_new_tokens=8)
