from configs.demo import DATA, OUT, few
from configs.rm_train import config as base

config = base | dict(
    data=DATA,
    init_from=f"{OUT}/sft",
    out=f"{OUT}/rm",
    batch_size=16,
    max_steps=240,  # one pass over the pairs; in a second the validation loss rises again
    learning_rate=5e-4,
    min_learning_rate=1e-5,
    warmup_steps=10,
    eval_interval=60,
    eval_pairs=200,
    eval_all=True,
    save_interval=120,
    keep_last=1,  # minutes to train again
    log_interval=5,
)
config |= few(eval_pairs=64, eval_all=False)
