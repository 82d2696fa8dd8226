from configs.data_process import config as base
from configs.poems.data import config as poems

# pairs of the fine-tuned model's own replies, and the prompts of all stages
config = base | dict(
    poems,
    out="data/poems/ranked",
    parts=["rm", "prompts"],
    sources=["ranked:pairs=data/poems/rows/ranked.jsonl", "requests:prompts=data/poems/rows/prompts.jsonl"],
    val_share=0.05,
)
