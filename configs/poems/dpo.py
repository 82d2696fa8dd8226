from configs.dpo_train import config as base

config = base | dict(
    data="data/poems/ranked",  # pairs of the fine-tuned model's own replies
    init_from="out/poems/sft",
    out="out/poems/dpo",
    beta=0.2,
    sft_coef=4.0,  # it weighs a mean over tokens against a sum over them; with 0.5 more poems lose their form
    batch_size=16,
    grad_accumulation_steps=1,
    max_steps=150,
    learning_rate=1e-4,
    min_learning_rate=1e-5,
    warmup_steps=10,
    eval_interval=75,
    eval_pairs=48,
    eval_prompts=64,
    eval_new_tokens=40,
    save_interval=75,
    keep_last=1,  # minutes to train again
    log_interval=5,
)
