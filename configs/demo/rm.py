from configs.rm_train import config as base

config = base | dict(
    data="data/demo",
    init_from="out/demo/sft",
    out="out/demo/rm",
    batch_size=16,
    max_steps=400,
    optimizer="muon",
    learning_rate=6e-4,
    min_learning_rate=6e-5,
    warmup_steps=10,
    eval_interval=200,
    eval_pairs=128,
    save_interval=200,
    log_interval=5,
)
