from configs.demo import DATA, OUT, few
from configs.dpo_train import config as base

config = base | dict(
    data=DATA,
    init_from=f"{OUT}/sft",
    out=f"{OUT}/dpo",
    beta=0.2,  # with 0.1 and a learning rate of 2e-4 the KL passes 20 nats a reply and the language falls apart
    batch_size=16,
    grad_accumulation_steps=1,
    max_steps=150,
    learning_rate=6e-5,
    min_learning_rate=6e-6,
    warmup_steps=10,
    eval_interval=50,
    eval_pairs=128,
    eval_prompts=64,
    eval_new_tokens=80,
    save_interval=50,
    keep_last=1,  # minutes to train again
    log_interval=5,
)
config |= few(eval_pairs=32, eval_prompts=8, eval_new_tokens=40)
