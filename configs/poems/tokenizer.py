"""The vocabulary of the poems, seconds on a CPU: python -m tokenizer.train configs/poems/tokenizer.py"""

from configs.tokenizer import config as base

config = base | dict(
    input=["data/poems/corpus.txt"],  # written by data_process, the training split only
    out="out/poems/tokenizer",
    vocab_size=6144,  # small: at dim 160 the embedding is nearly half of the parameters
    character_coverage=0.998,  # 1.02 characters a token: a verse is its characters, which the model can count
)
