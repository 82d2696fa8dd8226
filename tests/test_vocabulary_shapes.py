"""benchmarks/vocabulary.py: the models it compares have as many parameters as it says."""

import pytest
import torch

from model import Llama

FOUND = {"chatglm3": dict(rows=64793), "6144": dict(rows=6144), "12288": dict(rows=12288), "32000": dict(rows=32000)}


@pytest.fixture
def vocabulary(from_benchmarks):
    return from_benchmarks("vocabulary")


def built(vocabulary, shape, rows):
    with torch.device("meta"):
        return Llama(vocabulary.config_of(**shape, vocab_size=rows))


@pytest.mark.parametrize("rows", [6144, 64793])
def test_parameters_are_those_of_the_model_that_is_trained(vocabulary, rows):
    model = built(vocabulary, vocabulary.TRAINED, rows)
    assert vocabulary.parameters(vocabulary.TRAINED, rows) == model.num_params()


@pytest.mark.parametrize("size", ["10M", "50M", "250M"])
def test_each_vocabulary_gets_the_same_trunk_and_a_model_as_large(vocabulary, size):
    base = vocabulary.SIZES[size]
    shapes = vocabulary.shapes_of(base, FOUND)
    total = vocabulary.parameters(base, 64793)
    assert shapes.pop(("chatglm3", "both")) == base and len(shapes) == 6
    for (name, equal), shape in shapes.items():
        if equal == "trunk":
            assert shape == base
        else:
            assert 32 <= shape["dim"] / shape["n_layers"] <= 64
            assert built(vocabulary, shape, FOUND[name]["rows"]).num_params() == pytest.approx(
                total, rel=0.05
            )  # widths are multiples of 32
