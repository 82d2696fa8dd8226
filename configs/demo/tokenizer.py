"""The demo's vocabulary, seconds on a CPU: python -m tokenizer.train configs/demo/tokenizer.py"""

from configs.demo import DATA, OUT
from configs.tokenizer import config as base

config = base | dict(
    input=[f"{DATA}/corpus.txt"],  # written by data_process, the training split only
    out=f"{OUT}/tokenizer",
    vocab_size=6144,  # small: at dim 160 the embedding is nearly half of the parameters
    character_coverage=0.995,  # 1.41 characters per token; at 0.9995 rare characters crowd words out: 1.35
)
