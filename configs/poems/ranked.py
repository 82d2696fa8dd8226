from configs.ranked import config as base

config = base | dict(
    ckpt="out/poems/sft",
    data="data/poems",
    out="data/poems/rows/ranked.jsonl",
    reward="verse.rewards:rules",
    prompts=600,
    samples=8,
    pairs=2,
    max_new_tokens=40,
    temperature=0.8,
)
