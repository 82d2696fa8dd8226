"""Texts to train a tokenizer on, those that tokenizers get wrong, and what a reader sees of a stream of tokens."""

import random

from chains import ROOT

from tokenizer import StreamDecoder

SAMPLES = ROOT.parent / "shared" / "data" / "tokenizer"
LINES = [
    "酒店很好，房间干净",
    "这本书不好看",
    "电脑 very  good 123",
    "hello hello world",
    "</s> and <s> and <0x41>",
]
TRICKY = [
    "\u2581",
    " ",
    "   ",
    "\n",
    "\r\n",
    "\t",
    "\x01",
    "\x7f",
    "\0",
    "\u2585",
    "\ufffd",
    "\ufeff",
    "\u3000",
]
TRICKY += [
    "a",
    "酒店",
    "龘",
    "👋",
    "👨\u200d👩\u200d👧",
    "e\u0301",
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<0x41>",
    "12",
    "\u2028",
]


def random_texts(n, seed):
    """Awkward strings and any characters that Unicode allows in text, mixed."""
    rng = random.Random(seed)

    def part():
        if rng.random() < 0.7:
            return rng.choice(TRICKY)
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    return ["".join(part() for _ in range(rng.randrange(15))) for _ in range(n)]


def stream(tok, ids):
    decoder = StreamDecoder(tok)
    return "".join(decoder.push(i) for i in ids) + decoder.flush()
