from configs.data_process import config as base

config = base | dict(
    out="data/demo",
    tokenizer="out/demo/tokenizer",
    people_daily_characters=300_000,  # the demo is about reviews; a fifth of newspaper keeps its language broader
)
