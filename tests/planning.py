"""A small shape, and pretraining configs with some values changed, for the tests of what is planned."""

import copy

from configs.pretrain import config as base

SHAPE = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=512, max_seq_len=64)


def config_of(**changes):
    """The default config with these values; those of the model by their own names."""
    config = copy.deepcopy(base)
    for key, value in changes.items():
        (config["model"] if key in config["model"] else config)[key] = value
    return config
