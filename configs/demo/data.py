from configs.data_process import config as base
from configs.demo import DATA, OUT

config = base | dict(
    out=DATA,
    tokenizer=f"{OUT}/tokenizer",
    people_daily_characters=300_000,  # the demo is about reviews; a fifth of newspaper keeps its language broader
)
