"""Vocabularies of every kind that interop/ writes, and the texts that tell them apart."""

import io

import awkward
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from tokenizer import Tokenizer

LINES = [*awkward.LINES, "<unk>"]
LINES += ["The  quick BROWN fox 0123456789 ABCDEF x", "  哈哈哈哈哈哈", "--------", "再见！他说：“你好。”", "a  b\tc"]
LINES += ["1 < 2 > 0 / s </ ss <unkn"]  # the trainer takes "</s>" out of a line, but not its characters
TRICKY = [
    "",
    " ",
    "   ",
    " a ",
    "  a  b   c ",
    "a\u3000b",
    "\n",
    " \n ",
    "\n\n\n",
    "a\r\nb",
    "\t\ta",
    "\0",
    "a\0b",
    "\x01",
]
TRICKY += [
    "\u2581",
    "\u2581\u2581 \u2581",
    " \u2581 a \u2581 ",
    "a\u2581b",
    "\u2585",
    "\ufffd",
    "\ufeff",
    "\u2028",
    "e\u0301",
]
TRICKY += [
    "\U00020000\U0002a6d6",
    "龘",
    "\U0001f44b\U0001f3fd",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0301\u0301",
]
TRICKY += ["<0x41>", "<<0x0A>", "</", "s>", "<unk", "[gMASK]sop", "hello，world 12345", "very good酒店", "ａｂｃ１２３"]
SPECIAL = ["<s>", "</s>", "<unk>", "<s></s> </s>"]
RUNS = ["哈" * 1000, "-" * 500, " " * 300, "ab" * 300, "1" * 100]


def train(lines=LINES, **options):
    model = io.BytesIO()
    defaults = dict(model_type="unigram", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    defaults |= dict(hard_vocab_limit=False, vocab_size=420, character_coverage=1.0, num_threads=1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_writer=model, **(defaults | options)
    )
    return Tokenizer(model.getvalue())


AS_IT_IS = dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)


NAMES = ["ours", "unigram", "normalising", "glm", "tok512"]


every_tokenizer = pytest.mark.parametrize("tok", NAMES, indirect=True)


def edited(tok, change):
    """A tokenizer with one thing changed in its model."""
    model = sentencepiece_model_pb2.ModelProto.FromString(tok.model_bytes)
    change(model)
    return Tokenizer(model.SerializeToString())
