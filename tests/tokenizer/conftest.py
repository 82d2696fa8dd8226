"""A small vocabulary, the text that it is trained on, and ChatGLM3's."""

import pytest
from awkward import LINES, SAMPLES

from configs.tokenizer import config as train_defaults
from tokenizer import Tokenizer
from tokenizer.train import Corpus, train_bpe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_bytes("\n".join(LINES * 20).encode() + b"\n")
    return path


@pytest.fixture(scope="module")
def tok(corpus):
    config = train_defaults | dict(vocab_size=410, character_coverage=1.0)
    return Tokenizer(train_bpe(Corpus([str(corpus)], 1000), config))


@pytest.fixture(scope="module")
def glm():
    if not SAMPLES.is_dir():
        pytest.skip(f"no ChatGLM3 sample at {SAMPLES}")
    return Tokenizer.load(SAMPLES / "chatglm3_tokenizer.model")
