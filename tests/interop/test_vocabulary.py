"""Every format's vocabulary against SentencePiece: tokenizer.json, GGUF, llama2.c."""

import json
import random
import struct
from functools import partial

import pytest
from tokenizers import Tokenizer as HuggingFace
from vocabularies import AS_IT_IS, LINES, RUNS, SPECIAL, TRICKY, edited, every_tokenizer, train

from configs.tokenizer import config as train_defaults
from interop.vocabulary import (
    BYTE,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    gguf_vocabulary,
    llama2c_vocabulary,
    read_vocabulary,
    tokenizer_json,
)
from tokenizer import Tokenizer, TokenizerError
from tokenizer.train import Corpus, train_bpe


def hugging_face(tok, split_special_tokens=True):
    reference = HuggingFace.from_str(json.dumps(tokenizer_json(tok)))
    reference.encode_special_tokens = split_special_tokens
    return reference


def mismatches(tok, texts):
    """(text, Hugging Face's ids, ours) where they differ."""
    batch = hugging_face(tok).encode_batch(texts)
    rows = zip(texts, [encoding.ids for encoding in batch], tok.encode_batch(texts), strict=True)
    return [(text, theirs, ids) for text, theirs, ids in rows if theirs != ids]


def mixed_texts(n, seed):
    rng = random.Random(seed)

    def part():
        if rng.random() < 0.8:
            return rng.choice(TRICKY + SPECIAL + LINES)
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    return ["".join(part() for _ in range(rng.randrange(12))) for _ in range(n)]


# tokenizer.json


@every_tokenizer
def test_odd_texts_give_the_same_ids_and_come_back_the_same(tok):
    texts = TRICKY + SPECIAL
    assert mismatches(tok, texts) == []
    reference = hugging_face(tok)
    for text in texts + RUNS:
        assert reference.decode(tok.encode(text)) == tok.decode(tok.encode(text))


@every_tokenizer
def test_long_runs_of_a_character(tok):
    """SentencePiece's unigram models order the pieces of a run by rounding errors of float32."""
    wrong = mismatches(tok, RUNS)
    if read_vocabulary(tok).kind == "unigram":
        wrong = [row for row in wrong if sorted(row[1]) != sorted(row[2])]
    assert wrong == []


@pytest.mark.parametrize("tok", ["ours", "unigram", "glm", "tok512"], indirect=True)
def test_mixed_texts_give_the_same_ids(tok):
    assert mismatches(tok, mixed_texts(3000, seed=0)) == []


def test_any_text_comes_back_from_a_lossless_vocabulary(ours):
    reference = hugging_face(ours)
    for text in TRICKY + SPECIAL + mixed_texts(1000, seed=1):
        assert reference.decode(reference.encode(text).ids) == text


def test_merges_of_periodic_text():
    """Pieces that many merges can make, of characters that can be merged in many ways."""
    rng = random.Random(0)

    def texts(n):
        return ["".join(rng.choice("ab ") * rng.choice([1, 2, 3, 9]) for _ in range(40)) for _ in range(n)]

    options = AS_IT_IS | dict(model_type="bpe", split_by_whitespace=False, allow_whitespace_only_pieces=True)
    tok = train(texts(300), vocab_size=800, **options)
    assert mismatches(tok, texts(5000)) == []


def test_unigram_without_the_characters_of_byte_pieces():
    tok = train(["酒店很好，房间干净", "这本书不好看 0A", "s s unk"], vocab_size=290, **AS_IT_IS)
    assert not {"<", ">", "x"} & set(read_vocabulary(tok).pieces)
    assert mismatches(tok, TRICKY + SPECIAL + mixed_texts(2000, seed=2)) == []


NO_SPACES = ["酒店很好，房间干净", "这本书不好看"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_without_a_space_piece(kind):
    """Where spaces are written as the byte 0x20; llama.cpp and llama2.c have a piece for them or nothing."""
    tok = train(NO_SPACES, model_type=kind, **AS_IT_IS)
    assert not tok.has_space
    assert mismatches(tok, TRICKY + ["手机 很好 ok", *mixed_texts(1000, seed=4)]) == []
    if kind == "bpe":
        for convert in (gguf_vocabulary, llama2c_vocabulary):
            with pytest.raises(TokenizerError, match="needs a piece for the space"):
                convert(tok, tok.vocab_size)


def test_spaces_and_ascii_of_a_vocabulary_trained_on_text_without_them(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(NO_SPACES * 20), encoding="utf-8")
    tok = Tokenizer(train_bpe(Corpus([str(tmp_path / "corpus.txt")], 1000), train_defaults | dict(vocab_size=370)))
    texts = ["手机 很好 ok", *TRICKY, *mixed_texts(1000, seed=5)]
    assert mismatches(tok, texts) == [] and [t for t in texts if tok.decode(tok.encode(t)) != t] == []
    ascii_text = [bytes([byte]).decode() for byte in range(0x20, 0x7F)]
    pieces = gguf_vocabulary(tok, 370)["tokens"]
    assert [pieces[tok.encode(text)[0]] for text in ascii_text] == [text.replace(" ", "\u2581") for text in ascii_text]
    assert llama2c_vocabulary(tok, 370).count(struct.pack("<i", 1) + b" ") == 1


def test_text_never_merges_into_a_special_piece(ours):
    tok = edited(ours, rename("h", "</s"))
    assert mismatches(tok, ["</s>", "a</s></s>", "</s"]) == []


def test_rows_beyond_the_pieces_stay_out(glm):
    assert len(tokenizer_json(glm)["model"]["vocab"]) == 64_789
    reference = hugging_face(glm)
    assert [reference.token_to_id(name) for name in ("[MASK]", "[gMASK]", "[sMASK]", "sop")] == [None] * 4


def test_user_defined_pieces_come_first():
    options = AS_IT_IS | dict(model_type="bpe", user_defined_symbols=["<sep>", "哈哈", "\u2581\u2581", "ab"])
    tok = train(**options)
    assert (
        mismatches(tok, TRICKY + RUNS + ["abab", "哈哈哈", "a<sep>b  c", "<<sep>>"] + mixed_texts(2000, seed=3)) == []
    )
    assert hugging_face(tok).decode(tok.encode("a<sep>  b")) == "a<sep>  b"


@pytest.mark.parametrize("tok", ["ours", "glm"], indirect=True)
def test_any_ids_decode_the_same_but_for_broken_characters(tok):
    """Of bytes in a row that are not UTF-8 Hugging Face makes as many U+FFFD, SentencePiece keeps what it can.

    A space written as a byte, which no text gives, is dropped as a dummy prefix by Hugging Face alone.
    """
    rng, reference = random.Random(0), hugging_face(tok)
    byte_ids = [i for i, piece_type in enumerate(read_vocabulary(tok).types) if piece_type == BYTE]
    for _ in range(3000):
        ids = [rng.choice([rng.randrange(tok.vocab_size + 3), rng.choice(byte_ids)]) for _ in range(rng.randrange(12))]
        theirs, text = reference.decode(ids), tok.decode(ids)
        assert theirs in (text, text.removeprefix(" ")) or "\ufffd" in text


# real lines


def strings(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [value] if isinstance(value, str) else [text for part in value for text in strings(part)]


def texts_of(path):
    """Every string in a sample file."""
    text = path.read_bytes().decode()
    if path.suffix == ".txt":
        return [text]
    return strings(json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines())))


@pytest.fixture(scope="module")
def real_lines(shared_data):
    paths = [*sorted((shared_data / "pretrain").iterdir()), *sorted((shared_data / "sft").iterdir())]
    lines = {line.rstrip("\r") for path in paths for text in texts_of(path) for line in text.split("\n")}
    return sorted(lines)


@pytest.fixture(scope="module")
def trained_on_part(real_lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "lines.txt"
    path.write_text("\n".join(real_lines[::4]), encoding="utf-8")
    return Tokenizer(train_bpe(Corpus([str(path)], 16_384), train_defaults | dict(vocab_size=6000)))


@pytest.mark.parametrize("tok", ["trained_on_part", "glm", "tok512"], indirect=True)
def test_real_lines_give_the_same_ids(tok, real_lines):
    assert len(real_lines) > 30_000
    assert mismatches(tok, real_lines) == []


def test_a_vocabulary_trained_here_gives_all_real_text_back(trained_on_part, shared_data):
    paths = [
        path
        for name in ("pretrain", "sft", "preference", "one_record_schemas")
        for path in (shared_data / name).iterdir()
    ]
    texts = [text for path in paths for text in texts_of(path)]
    assert sum(map(len, texts)) > 3_300_000
    assert [text for text in texts if trained_on_part.decode(trained_on_part.encode(text)) != text] == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [AS_IT_IS, {}], ids=["identity", "nmt_nfkc"])
def test_real_lines_with_a_unigram_model(options, real_lines):
    """Equal, but for the order of the pieces of a run of one character."""
    tok = train(real_lines[::80], vocab_size=8000, character_coverage=0.9995, **options)
    wrong = mismatches(tok, real_lines)
    assert len(wrong) < len(real_lines) / 200
    for text, theirs, ids in wrong:
        assert sorted(theirs) == sorted(ids) and tok.decode(theirs) == tok.decode(ids), text


# GGUF and llama2.c


def test_gguf_of_chatglm3(glm):
    table = gguf_vocabulary(glm, glm.vocab_size)
    assert len(table["tokens"]) == len(table["scores"]) == len(table["types"]) == 64_793 == len(set(table["tokens"]))
    assert table["tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and table["types"][:4] == [2, 3, 3, 6]
    assert table["tokens"][-4:] == ["[PAD64789]", "[PAD64790]", "[PAD64791]", "[PAD64792]"]
    assert table["types"][-5:] == [NORMAL] + [UNUSED] * 4
    assert min(table["scores"][:-4]) > max(table["scores"][-4:])
    assert (table["model"], table["add_space_prefix"], table["notes"]) == ("llama", True, [])


def test_gguf_notes(ours, tok512):
    assert ["U+2581" in note for note in gguf_vocabulary(ours, 420)["notes"]] == [True]
    assert ["runs of spaces" in note for note in gguf_vocabulary(tok512, 512)["notes"]] == [True]
    assert gguf_vocabulary(ours, 420)["add_space_prefix"] is False


def test_tokenizer_bin_is_the_one_of_llama2c(tok512, shared_data):
    golden = (shared_data / "llama2c" / "tok512.bin").read_bytes()
    assert llama2c_vocabulary(tok512, 512) == golden
    longer = llama2c_vocabulary(tok512, 514)
    rows = b"".join(struct.pack("<fi", -1e6, 8) + name for name in (b"[PAD512]", b"[PAD513]"))
    assert longer[4:] == golden[4:] + rows
    assert longer[:4] == struct.pack("<i", max(8, struct.unpack("<i", golden[:4])[0]))


# refusals


def set_type(text, piece_type):
    def change(model):
        (piece,) = [piece for piece in model.pieces if piece.piece == text]
        piece.type = piece_type

    return change


def rename(old, new):
    def change(model):
        (piece,) = [piece for piece in model.pieces if piece.piece == old]
        piece.piece = new

    return change


def setting(path, value):
    spec, name = path.split(".")
    return lambda model: setattr(getattr(model, spec), name, value)


def equal_scores(model):
    for piece in model.pieces:
        piece.score = 0.0


to_512 = partial(gguf_vocabulary, n_rows=512), partial(llama2c_vocabulary, n_rows=512)
REFUSED = [
    ("ours", setting("trainer_spec.model_type", 4), [tokenizer_json, *to_512], "it is a char model"),
    ("ours", setting("trainer_spec.treat_whitespace_as_suffix", True), [tokenizer_json, *to_512], "end words"),
    ("ours", setting("normalizer_spec.escape_whitespaces", False), [tokenizer_json, *to_512], "spaces stay spaces"),
    ("ours", set_type("h", UNUSED), [tokenizer_json, *to_512], "unused pieces"),
    ("ours", setting("normalizer_spec.remove_extra_whitespaces", True), [tokenizer_json], "collapses spaces"),
    ("ours", equal_scores, [tokenizer_json], "share a score"),
    ("glm", set_type("哈哈", USER_DEFINED), [tokenizer_json], "user-defined pieces need"),
    (
        "glm",
        set_type("哈哈", USER_DEFINED),
        [partial(gguf_vocabulary, n_rows=64_789)],
        "a space after each user-defined",
    ),
    ("unigram", set_type("哈", USER_DEFINED), [tokenizer_json], "unigram model with user-defined"),
    (
        "ours",
        lambda model: (set_type("h", USER_DEFINED)(model), rename("h", " h")(model)),
        [tokenizer_json],
        "hold spaces",
    ),
    ("unigram", rename("h", "h龘"), [tokenizer_json], "characters of its pieces"),
    ("unigram", None, to_512, "no unigram model"),
    ("normalising", None, to_512, "would not normalise"),
    ("ours", rename("h", "</s"), to_512, "would make </s> of typed text"),
    (
        "ours",
        None,
        [partial(gguf_vocabulary, n_rows=400), partial(llama2c_vocabulary, n_rows=400)],
        "more than 400 rows",
    ),
    ("ours", set_type("h", USER_DEFINED), [to_512[1]], "user-defined"),
]


@pytest.mark.parametrize("name, change, converters, message", REFUSED, ids=[row[3] for row in REFUSED])
def test_refusals(request, name, change, converters, message):
    tok = request.getfixturevalue(name)
    tok = edited(tok, change) if change else tok
    for convert in converters:
        with pytest.raises(TokenizerError, match=message):
            convert(tok)


def test_refusals_without_byte_pieces():
    tok = train(["酒店很好", "这本书不好看"], vocab_size=20, byte_fallback=False, **AS_IT_IS)
    with pytest.raises(TokenizerError, match="nor the characters of its special ones"):
        tokenizer_json(tok)
    tok = train(byte_fallback=False, model_type="bpe", vocab_size=150, **AS_IT_IS)
    assert mismatches(tok, TRICKY + SPECIAL + RUNS) == []
    with pytest.raises(TokenizerError, match="needs byte pieces"):
        gguf_vocabulary(tok, 512)
    with pytest.raises(TokenizerError, match="at the ids 3 to 258"):
        llama2c_vocabulary(tok, 512)
