"""Tokenizer: ChatGLM3's reference vectors, losslessness of trained vocabularies, loading."""

import hashlib
import json
import os
import random
import subprocess
import sys

import pytest
from awkward import SAMPLES, TRICKY, random_texts, stream
from chains import ROOT
from sentencepiece import sentencepiece_model_pb2

from tokenizer import StreamDecoder, Tokenizer, TokenizerError


def random_ids(tok, n, seed):
    """Sequences thick with byte pieces, whole and broken characters, spaces, specials and ids beyond the pieces."""
    rng = random.Random(seed)
    byte_ids, high = tok.encode("\0龘👋\u2585"), tok.n_pieces + 5
    choices = [
        lambda: rng.randrange(high),
        lambda: rng.choice(byte_ids),
        lambda: rng.choice(tok.encode(" a  ")),
    ]
    return [[rng.choice(choices)() for _ in range(rng.randrange(1, 12))] for _ in range(n)]


# ChatGLM3


def glm_vectors():
    path = SAMPLES / "chatglm3_tokenizer_vectors.json"
    return json.loads(path.read_text(encoding="utf-8"))["vectors"] if path.exists() else []


def test_chatglm3_contract(glm):
    assert glm.vocab_size == 64_793 and glm.n_pieces == 64_789
    assert (glm.pad_id, glm.bos_id, glm.eos_id) == (0, 1, 2)
    assert glm.sha256 == "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2"
    assert glm.decode([64790, 64792, 1, 36474, 54591, 2, 0, 64795]) == "你好"


def test_chatglm3_vectors(glm):
    role_ids = {"system": 64794, "user": 64795, "assistant": 64796}
    vectors = glm_vectors()
    assert len(vectors) == 19
    for vector in vectors:
        prefix = [64790, 64792]  # [gMASK] sop
        if vector["kind"] == "decode":
            assert glm.decode(vector["ids"]) == vector["text"] == stream(glm, vector["ids"])
            continue
        if vector["kind"] == "encode":
            ids = (prefix if vector["add_special_tokens"] else []) + glm.encode(vector["text"])
        elif vector["kind"] == "encode_pair":
            ids = prefix + glm.encode(vector["text"]) + glm.encode(vector["text_pair"]) + [glm.eos_id]
        else:
            assert vector["kind"] == "chatglm3_chat"
            ids = prefix
            for message in vector["messages"]:
                ids = ids + [role_ids[message["role"]]] + glm.encode("\n") + glm.encode(message["content"])
            ids = ids + [role_ids["assistant"]]
        assert ids == vector["ids"], vector["source"]


def test_chatglm3_text_never_makes_special_ids(glm):
    for text in ["</s>", "<s>", "<unk>", "[gMASK]sop", "<|user|>", *random_texts(500, seed=3)]:
        assert all(2 < i < 64_789 for i in glm.encode(text))


# losslessness and streaming


def test_round_trip_of_any_text(tok):
    texts = TRICKY + random_texts(3000, seed=0) + ["", " " * 40, "\n\n\n", "\u2581\u2581 \u2581"]
    batch = tok.encode_batch(texts, num_threads=2)
    for text, ids in zip(texts, batch, strict=True):
        assert ids == tok.encode(text)
        assert tok.decode(ids) == text
        assert all(i > 2 for i in ids)


def test_stream_equals_decode(tok):
    for ids in [tok.encode(text) for text in random_texts(500, seed=1)] + random_ids(tok, 3000, seed=1):
        assert stream(tok, ids) == tok.decode(ids)


def test_stream_equals_decode_with_dummy_prefix(glm):
    for ids in random_ids(glm, 3000, seed=2):
        assert stream(glm, ids) == glm.decode(ids)


def test_stream_never_shows_half_a_character(tok):
    decoder, ids = StreamDecoder(tok), tok.encode("龘👋")
    assert len(ids) == 7  # 3 + 4 byte pieces
    assert [decoder.push(i) for i in ids] == ["", "", "龘", "", "", "", "👋"]
    assert [decoder.push(ids[0]), decoder.push(tok.eos_id), decoder.flush(), decoder.flush()] == [
        "",
        "",
        "\ufffd",
        "",
    ]


def test_lone_surrogate_is_named(tok):
    for encode in (tok.encode, lambda text: tok.encode_batch(["fine", text])):
        with pytest.raises(TokenizerError, match="lone surrogate at character 3"):
            encode("abc\ud83d")


# loading


def test_load_file_and_directory(tok, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tok.model_bytes)
    for source in (tmp_path, tmp_path / "tokenizer.model", str(tmp_path)):
        loaded = Tokenizer.load(source)
        assert loaded.model_bytes == tok.model_bytes
        assert loaded.sha256 == hashlib.sha256(tok.model_bytes).hexdigest()


@pytest.mark.parametrize("content", [b"", b"garbage" * 10])
def test_load_refuses_what_is_no_model(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="tokenizer.model: not a SentencePiece model"):
        Tokenizer.load(path)


def test_load_refuses_pieces_that_are_no_text_and_missing_bytes(tok):
    spoilt = tok.model_bytes.replace("酒".encode(), b"\xff\x85\x92")
    model = sentencepiece_model_pb2.ModelProto.FromString(tok.model_bytes)
    next(piece for piece in model.pieces if piece.piece == "<0xE2>").type = 1  # of U+2581, a normal piece now
    for content in (spoilt, model.SerializeToString()):
        assert content != tok.model_bytes
        with pytest.raises(TokenizerError, match=r"not a SentencePiece model, or damaged \(\d+ bytes\)"):
            Tokenizer(content)


def test_what_only_protobuf_refuses_is_refused_too(tok):
    odd = Tokenizer(tok.model_bytes)
    odd.model_bytes = odd.model_bytes[:-1]  # it reads more closely than SentencePiece, which passes over some damage
    with pytest.raises(TokenizerError, match="a damaged SentencePiece model"):
        odd.changes  # noqa: B018


def test_load_names_the_missing_path(tmp_path):
    for source in (tmp_path, tmp_path / "no.model", "no/such.model"):
        with pytest.raises(TokenizerError, match="no tokenizer at"):
            Tokenizer.load(source)


def test_load_from_offline_hub_cache(tok, tmp_path):
    repo, commit = tmp_path / "models--someone--a-model", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "tokenizer.model").write_bytes(tok.model_bytes)
    code = (
        "import sys; from tokenizer import Tokenizer, TokenizerError\n"
        "print(Tokenizer.load('someone/a-model', cache_dir=sys.argv[1]).sha256)\n"
        "try: Tokenizer.load('someone/another', cache_dir=sys.argv[1])\n"
        "except TokenizerError as error: print(error)\n"
    )
    # the hub library reads HF_HUB_OFFLINE when it is imported
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    sha256, refusal = run.stdout.splitlines()
    assert sha256 == tok.sha256
    assert refusal.startswith("no tokenizer at someone/another, and none from Hugging Face someone/another:")
