"""A tokenizer of each kind."""

import pytest
from vocabularies import AS_IT_IS, LINES, train

from configs.tokenizer import config as train_defaults
from tokenizer import Tokenizer
from tokenizer.train import Corpus, train_bpe


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(LINES * 20), encoding="utf-8")
    config = train_defaults | dict(vocab_size=420, character_coverage=1.0)
    return Tokenizer(train_bpe(Corpus([str(path)], 1000), config))


@pytest.fixture(scope="module")
def unigram():
    return train(**AS_IT_IS)


@pytest.fixture(scope="module")
def normalising():
    return train(normalization_rule_name="nmt_nfkc")


@pytest.fixture(scope="module")
def glm(shared_data):
    return Tokenizer((shared_data / "tokenizer" / "chatglm3_tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def tok512(shared_data):
    return Tokenizer((shared_data / "llama2c" / "tok512.model").read_bytes(), document_ids=(1, 1))


@pytest.fixture
def tok(request):
    return request.getfixturevalue(request.param)
