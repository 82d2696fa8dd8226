from configs.recipes import AT_ONCE, DATA, OUT, SIZE, WIDER, batches, few
from configs.sft import config as base

recipe = dict(
    data=DATA,
    init_from=f"{OUT}/pretrain",
    out=f"{OUT}/sft",
    packing=True,
    pack_len=512,  # as long as data_process makes a conversation
    max_steps=16_000,  # 524M tokens
    learning_rate=base["learning_rate"] / WIDER,
    min_learning_rate=base["min_learning_rate"] / WIDER,
    eval_interval=1000,
    eval_new_tokens=256,
    save_interval=1000,
)
config = base | recipe | batches(64, AT_ONCE[SIZE])
config |= few(pack_len=0, eval_examples=16, eval_prompts=8, eval_new_tokens=8)
