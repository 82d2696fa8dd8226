from configs.data_process import config as base

ROWS = "data/poems/rows"  # written by python -m corpora.poems

config = base | dict(
    out="data/poems",
    tokenizer="out/poems/tokenizer",
    sources=[
        f"poems:text_rows={ROWS}/poems.jsonl",
        f"tasks:alpaca={ROWS}/sft.jsonl",
        f"faults:pairs={ROWS}/rm.jsonl",
        f"requests:prompts={ROWS}/prompts.jsonl",
    ],
    clean=base["clean"] | dict(web_junk=False, max_top_ngram=1.0, max_repeated_ngrams=1.0),  # refrains are no junk
    unit_bytes=4_000_000,  # several units, so that all cores have some
    val_share=0.01,
    max_seq_len=160,
    prompts_max_len=64,
    prompts_train=8000,
    prompts_val=400,
)
