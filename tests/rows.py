"""Rows of corpora and the records that the adapters of their layouts give, for tests."""

from corpora.sources import SOURCES


def adapt(layout, row):
    return list(SOURCES[layout].adapter(row))


def one(layout, row):
    [result] = adapt(layout, row)
    return result


def chat(*texts, system=None):
    """The messages of a conversation that the user begins."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def human_gpt(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
