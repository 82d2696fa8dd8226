from configs.demo import DATA, OUT, few
from configs.sft import config as base

config = base | dict(
    data=DATA,
    init_from=f"{OUT}/pretrain",
    out=f"{OUT}/sft",
    batch_size=16,
    grad_accumulation_steps=1,
    example_weight="example",  # else the answers of one word are drowned by the reviews
    max_steps=2000,  # one pass
    optimizer="muon",
    learning_rate=3e-3,
    min_learning_rate=0.0,
    warmup_steps=20,
    eval_interval=500,
    eval_examples=128,
    save_interval=500,
    keep_last=1,  # minutes to train again
    log_interval=5,
)
config |= few(max_steps=60, warmup_steps=10, eval_examples=32, eval_prompts=16, eval_new_tokens=40)
