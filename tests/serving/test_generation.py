"""serving.generation: text up to a stop, whatever pieces it comes in."""

import random

import pytest

from serving.generation import Text, named, overlap
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tok(tokenizer_path):
    return Tokenizer.load(tokenizer_path)


@pytest.mark.parametrize("text, stop, n", [("ab", "bc", 1), ("aab", "aabaac", 3), ("abab", "ababc", 4), ("a", "b", 0)])
def test_overlap_by_hand(text, stop, n):
    assert overlap(text, stop) == n


def test_text_ends_before_the_first_stop_and_keeps_its_tokens(tok):
    rng = random.Random(0)
    for _ in range(300):
        whole = "".join(rng.choice("甲乙龘 a") for _ in range(12))
        ids = tok.encode(whole)
        stops = ["".join(rng.choice("甲乙龘 a") for _ in range(rng.randint(1, 3))) for _ in range(2)]
        text, pieces = Text(tok, stops), []
        for place, token in enumerate(ids):
            pieces.append(text.push(token, place))
            if text.stopped:
                break
        else:
            pieces.append(text.rest())
        pieces = [piece for piece in pieces if piece]
        prefixes = (tok.decode(ids[:n]) for n in range(len(ids) + 1))
        ended = next((prefix for prefix in prefixes if any(stop in prefix for stop in stops)), None)
        ends = [ended.find(stop) for stop in stops if stop in ended] if ended else []
        shown = "".join(piece.text for piece in pieces)
        assert shown == (whole[: min(ends)] if ends else whole) and text.stopped == bool(ends)
        places = [place for piece in pieces for place in piece.tokens]
        assert places == list(range(len(places)))
        if not ends:
            assert len(places) == len(ids)


def test_bytes_of_tokens_are_those_of_the_text(tok):
    for text in ("甲乙", " a  b\n", "龘😀", "</s>"):
        assert b"".join(map(tok.bytes_of, tok.encode(text))) == text.encode()
    assert [tok.bytes_of(i) for i in (0, 1, 2, tok.n_pieces)] == [b""] * 4


def test_names_of_tokens(tok):
    part = tok.encode("龘")[0]
    assert named(tok, part, -1.0).text == "bytes:\\x" + "龘".encode()[:1].hex()
    assert named(tok, tok.eos_id, -1.0).text == "</s>" and named(tok, tok.eos_id, float("-inf")).logp == -9999.0
