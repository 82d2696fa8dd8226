from configs.demo import DATA, OUT, few
from configs.pretrain import config as base

# 2.25M parameters: a few minutes on two CPU cores
config = base | dict(
    data=DATA,
    tokenizer=f"{OUT}/tokenizer",
    out=f"{OUT}/pretrain",
    model=base["model"] | dict(dim=160, n_layers=4, n_heads=5, n_kv_heads=5, max_seq_len=256),
    seq_len=256,
    batch_size=4,
    grad_accumulation_steps=1,
    max_steps=1300,
    optimizer="muon",  # well ahead of AdamW at equal time here
    learning_rate=5e-3,
    min_learning_rate=0.0,
    warmup_steps=50,
    eval_interval=325,
    eval_tokens=16384,
    eval_all=True,
    save_interval=325,
    keep_last=1,  # minutes to train again
    log_interval=5,
    sample_prompts=["", "这本书", "酒店的", "笔记本"],
    sample_tokens=60,
)
config |= few(max_steps=60, warmup_steps=10, eval_tokens=4096, eval_all=False, sample_tokens=20)
