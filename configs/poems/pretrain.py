from configs.pretrain import config as base

# 2.25M parameters, as many as the demo's
config = base | dict(
    data="data/poems",
    tokenizer="out/poems/tokenizer",
    out="out/poems/pretrain",
    model=base["model"] | dict(dim=160, n_layers=4, n_heads=5, n_kv_heads=5, max_seq_len=160),
    seq_len=128,
    batch_size=8,  # twice the steps of 16 rows, as many tokens: more poems have a form (docs/poems.md)
    grad_accumulation_steps=1,
    max_steps=2600,
    optimizer="muon",
    learning_rate=5e-3,
    momentum=0.95,  # the defaults learn more of the text, but what follows keeps fewer rules (docs/poems.md)
    embedding_rate=1.0,
    min_learning_rate=2.5e-4,
    warmup_steps=100,
    eval_interval=1300,
    eval_tokens=16384,
    eval_all=True,
    save_interval=650,
    keep_last=1,  # minutes to train again
    log_interval=10,
    sample_prompts=["春日\n", "送友人\n", "山居\n", "夜雨\n"],
    sample_tokens=90,
)
