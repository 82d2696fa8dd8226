from configs.sft import config as base

config = base | dict(
    data="data/poems",
    init_from="out/poems/pretrain",
    out="out/poems/sft",
    batch_size=32,
    grad_accumulation_steps=1,
    max_steps=1500,  # one pass
    optimizer="muon",
    learning_rate=3e-3,
    min_learning_rate=1e-4,
    warmup_steps=20,
    eval_interval=750,
    eval_examples=128,
    eval_prompts=64,
    eval_new_tokens=80,
    save_interval=375,
    keep_last=1,  # minutes to train again
    log_interval=5,
)
