import os

from configs.data_process import config as base
from configs.recipes import DATA, RECIPE, SAMPLES, SMOKE, SOURCES, TOKENIZER, in_smoke

named = SOURCES[RECIPE]
if SMOKE:
    named = [f"{name}={SAMPLES}/{name}.jsonl" for name in named]
if os.environ.get("SOURCES"):
    named = os.environ["SOURCES"].split(",")
recipe = dict(
    out=DATA,
    tokenizer=TOKENIZER,
    sources=named,
    hub=os.environ.get("HUB") or base["hub"],
    dedup="near",
    clean=base["clean"] | dict(mask_personal=True, join_lines=RECIPE == "novels"),  # cut to a fixed width, often
    decontaminate=[os.environ["QUESTIONS"]] if os.environ.get("QUESTIONS") else [],  # a folder of C-Eval and CMMLU
    val_share=0.005,  # of billions of tokens and millions of conversations
    max_seq_len=512,  # for all sizes, so that they share the data
    prompts_train=20_000,
    prompts_val=400,
)
config = base | recipe | in_smoke(val_share=0.1, max_seq_len=128, prompts_max_len=64)
