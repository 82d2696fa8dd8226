from configs.recipes import AT_ONCE, DATA, OUT, SIZE, WIDER, batches, few
from configs.rm_train import config as base

recipe = dict(
    data=DATA,
    init_from=f"{OUT}/sft",
    out=f"{OUT}/rm",
    learning_rate=base["learning_rate"] / WIDER,
    min_learning_rate=base["min_learning_rate"] / WIDER,
    eval_all=True,
)
config = base | recipe | batches(32, AT_ONCE[SIZE] // 2) | few(eval_pairs=16)  # a pair has two rows
