"""The demo's vocabulary, seconds on a CPU: python -m tokenizer.train configs/demo/tokenizer.py"""

from configs.tokenizer import config as base

config = base | dict(
    input=["data/demo/corpus.txt"],  # written by data_process, the training split only
    out="out/demo/tokenizer",
    vocab_size=6144,  # small: at dim 160 the embedding is nearly half of the parameters
    character_coverage=0.995,  # 1.42 characters per token; at 0.9995 rare characters crowd words out: 1.35
)
