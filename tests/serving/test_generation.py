"""serving.generation: text up to a stop, whatever pieces it comes in."""

import json
import random

import pytest
from tiny import tiny

from common import checkpoint
from serving.generation import Job, Started, Text, answer, load, named, overlap
from serving.protocol import Answer, ApiError, Token, Wanted, event
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tok(tokenizer_path):
    return Tokenizer.load(tokenizer_path)


def test_an_event_is_one_line_for_every_client():
    text = "一\u2028二\x85三\u2029四\n五"
    line, end = event(dict(text=text)).decode()[:-2], event("[DONE]")
    assert len(line.splitlines()) == 1 and json.loads(line.removeprefix("data: "))["text"] == text
    assert "一" in line and end == b"data: [DONE]\n\n"


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


def test_a_reply_that_the_server_ends_is_not_called_finished(tok, tmp_path):
    facts = dict(stage="sft", step=1, tokens_seen=9, config={}, tokenizer=tok.model_bytes)
    checkpoint.save(tmp_path, model=tiny(vocab_size=tok.vocab_size), **facts)
    sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_new_tokens=8)
    told = []

    def emit(event):
        told.append(event)
        job.cancelled = True  # after the first, as a server does that closes

    wanted = Wanted("m", [dict(role="user", content="好")], None, sampling, 1, [], None, True, True)
    job = Job(tmp_path / "ckpt.pt", wanted, emit)
    with pytest.raises(ApiError, match="the server is stopping"):
        answer(load(job.path, "cpu"), job)
    assert [type(event) for event in told] == [Started]


def test_offsets_of_a_completion_count_the_characters_of_its_text(tok):
    def offsets(text, *parts):
        """Of the parts' bytes, in a reply that comes in one piece."""
        tokens = [(Token("x", part, -1.0), []) for part in parts]
        reply = Answer(Wanted("m", None, "p", {}, 1, [], 0, False, False))
        return reply.logprobs(text, tokens)["text_offset"]

    assert offsets("😀好", *(bytes([byte]) for byte in "😀".encode()), "好".encode()) == [0, 0, 0, 0, 1]
    for broken in (b"\x9b", b"\xe4\xb8", b"\xe4\xb8\xe4\xb8", b"\xe4\xff\xb8", "好".encode()[:2] + "😀".encode()):
        pieces = [*(bytes([byte]) for byte in broken), "从来".encode(), b"!"]
        ids = [tok._sp.piece_to_id(f"<0x{byte:02X}>") for byte in broken] + tok.encode("从来!")
        text = tok.decode(ids)
        found = offsets(text, *pieces)
        assert [text[found[-2] : found[-1]], text[found[-1] :]] == ["从来", "!"]
    assert offsets("好吧", " 好".encode(), "吧".encode()) == [0, 1]  # ChatGLM3's first token begins with a space
    assert offsets(" 好吧", " 好".encode(), "吧".encode()) == [0, 2]


def test_the_token_that_was_drawn_is_among_those_named():
    reply = Answer(Wanted("m", None, "p", {}, 1, [], 1, False, False))
    tokens = [(Token("丙", "丙".encode(), -5.0), [Token("甲", "甲".encode(), -0.1)])]
    assert reply.logprobs("丙", tokens)["top_logprobs"] == [{"丙": -5.0, "甲": -0.1}]


def test_names_of_tokens(tok):
    part = tok.encode("龘")[0]
    assert named(tok, part, -1.0).text == "bytes:\\x" + "龘".encode()[:1].hex()
    assert named(tok, tok.eos_id, -1.0).text == "</s>" and named(tok, tok.eos_id, float("-inf")).logp == -9999.0
