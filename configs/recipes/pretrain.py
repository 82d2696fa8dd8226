from configs.pretrain import config as base
from configs.recipes import AT_ONCE, DATA, MODEL, OUT, RECIPE, ROWS, SIZE, STEPS, TOKENIZER, WIDER, batches, few

recipe = dict(
    data=DATA,
    tokenizer=TOKENIZER,
    out=f"{OUT}/pretrain",
    model=base["model"] | MODEL,
    seq_len=MODEL["max_seq_len"],
    max_steps=STEPS[SIZE],
    optimizer="muon",  # with wsd 40 % of AdamW's tokens to the same loss, at dim 160: docs/pretrain.md
    schedule="wsd",
    learning_rate=min(5e-3, 1.6e-3 / WIDER),  # 5e-3 was best at dim 160; narrower is not measured
    min_learning_rate=0.0,
    momentum=0.95,  # as published; 0.9 is better in runs of some hundred steps, the only ones measured
    warmup_steps=1000,
    eval_interval=1000,
    eval_tokens=1_000_000,
    save_interval=1000,
    sample_prompts=["", "夜色渐深，", "他握紧了手中的剑"] if RECIPE == "novels" else base["sample_prompts"],
)
config = base | recipe | batches(ROWS[SIZE], AT_ONCE[SIZE]) | few(eval_tokens=4096, sample_tokens=8)
