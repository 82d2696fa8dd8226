from configs.rm_train import config as base

config = base | dict(
    data="data/poems",
    init_from="out/poems/sft",
    out="out/poems/rm",
    batch_size=16,
    max_steps=300,  # about half a pass over the pairs
    learning_rate=1e-3,
    min_learning_rate=1e-5,
    warmup_steps=10,
    eval_interval=100,
    eval_pairs=160,
    save_interval=150,
    keep_last=1,  # minutes to train again
    log_interval=5,
)
