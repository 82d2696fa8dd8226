from configs.data_process import config as base
from configs.poems.data import config as poems

# requests on titles that no training text has: what the stages are compared on, and nothing is tuned on
config = base | dict(
    poems,
    out="data/poems/heldout",
    parts=["prompts"],
    sources=["requests:prompts=data/poems/rows/heldout_prompts.jsonl"],
    val_share=0.99,
    prompts_val=1000,
)
