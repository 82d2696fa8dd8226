"""Tokenizer: ChatGLM3's reference vectors, losslessness of trained vocabularies, the prompt format, training."""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import count

import pytest
import sentencepiece
from chains import ROOT
from saving import killed_before
from sentencepiece import sentencepiece_model_pb2

from common.config import UserError, ending
from configs.tokenizer import config as train_defaults
from tokenizer import (
    StreamDecoder,
    Tokenizer,
    TokenizerError,
    encode_documents,
    encode_example,
    encode_examples,
    encode_opening,
    encode_pair,
    encode_prompt,
    fit_prompt,
)
from tokenizer.train import Corpus, characters_per_token, cut_line, main, train_bpe

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


def random_texts(n, seed):
    """Awkward strings and any characters that Unicode allows in text, mixed."""
    rng = random.Random(seed)

    def part():
        if rng.random() < 0.7:
            return rng.choice(TRICKY)
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    return ["".join(part() for _ in range(rng.randrange(15))) for _ in range(n)]


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


def stream(tok, ids):
    decoder = StreamDecoder(tok)
    return "".join(decoder.push(i) for i in ids) + decoder.flush()


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


# prompt format


def chat(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    messages = [dict(role=role, content=text) for role, text in zip(roles, texts, strict=False)]
    return messages if system is None else [dict(role="system", content=system), *messages]


def test_document_and_opening(tok):
    assert encode_documents(tok, ["好", ""]) == [[*tok.encode("好"), 2], [2]]
    assert encode_opening(tok, "好") == [2, *tok.encode("好")]


def test_conversation_layout_and_loss_mask(tok):
    q1, a1, q2, a2 = map(tok.encode, ("房间", "很好，干净", "书", "不好看"))
    example, note = encode_example(tok, chat("房间", "很好，干净", "书", "不好看"), 100)
    assert note is None
    assert example.ids == [*q1, 1, *a1, 2, *q2, 1, *a2, 2]
    mask = [0] * (len(q1) + 1) + [1] * (len(a1) + 1) + [0] * (len(q2) + 1) + [1] * (len(a2) + 1)
    assert example.loss_mask == mask
    prompt = encode_prompt(tok, chat("房间", "很好，干净", "书"))
    assert prompt == [*q1, 1, *a1, 2, *q2, 1] == example.ids[: len(prompt)]


def test_system_text_is_prefixed_to_the_first_question(tok):
    prompt = encode_prompt(tok, chat("房间", "很好", "书", system="你好"))
    assert prompt == encode_prompt(tok, chat("你好\n房间", "很好", "书"))


def test_control_pieces_typed_by_a_user_stay_text(tok):
    prompt = encode_prompt(tok, chat("</s><s>good"))
    assert prompt[-1] == 1 and all(i > 2 for i in prompt[:-1])
    assert tok.decode(prompt) == "</s><s>good"


def test_long_question_is_cut_on_its_left(tok):
    text = "这本书不好看" * 5
    question, answer = tok.encode(text), tok.encode("很好")
    messages = chat(text, "很好")
    room = len(answer) + 2  # <bos> and <eos>
    for fits in range(1, len(question)):
        example, note = encode_example(tok, messages, room + fits)
        kept = len(example.ids) - room
        assert note == "cut question" and example.ids[kept:] == [1, *answer, 2]
        assert text.endswith(tok.decode(example.ids[:kept])) and fits - 1 <= kept <= fits
        assert example.loss_mask == [0] * (kept + 1) + [1] * (len(answer) + 1)
    assert encode_example(tok, messages, room + len(question))[1] is None
    assert encode_example(tok, messages, room) == (None, "answer too long")
    with pytest.raises(TokenizerError, match="no room"):
        encode_prompt(tok, messages[:1], 1)


def test_oldest_turns_are_dropped_whole_and_the_system_text_stays(tok):
    messages = chat("房间", "很好", "书", "不好看", system="你好")
    last, _ = encode_example(tok, chat("书", "不好看", system="你好"))
    full, _ = encode_example(tok, messages)
    assert encode_example(tok, messages, len(full.ids)) == (full, None)
    for max_len in (len(full.ids) - 1, len(last.ids)):
        assert encode_example(tok, messages, max_len) == (last, "dropped turns")
    cut, note = encode_example(tok, messages, len(last.ids) - 1)
    assert (tok.decode(cut.ids), note) == ("好\n书不好看", "cut question")
    assert encode_prompt(tok, messages[:-1], len(last.ids) - len(tok.encode("不好看")) - 1) == encode_prompt(
        tok, chat("书", system="你好")
    )


def asked(tok, question, room, system=None):
    """(what is left of a question in `room` tokens, the note)."""
    ids, note = fit_prompt(tok, chat(question, system=system), room + 1)
    assert len(ids) <= room + 1 and ids[-1] == 1
    return tok.decode(ids), note


def test_a_long_prompt_begins_at_a_sentence(tok, glm):
    last = "这本书不好看，电脑很好"
    for t in (tok, glm):
        for before in ("酒店很好。", "房间干净！”\n", "hello world. ", "酒店很好，"):  # the last is a clause
            room = len(t.encode(before + last)) - 1
            assert asked(t, before * 9 + last, room) == (last, "cut question"), before
    room = len(tok.encode("LLO" + last))  # no word is cut
    assert asked(tok, "酒店HELLO" * 9 + last, room) == (last, "cut question")
    for t in (tok, glm):  # a sentence that begins behind the middle would leave too little
        text, note = asked(t, "酒店很好房间干净" * 9 + "。很好", 20)
        assert note == "cut question" and text.endswith("房间干净。很好") and len(text) > 10
        assert asked(t, "龘" * 50, len(t.encode("龘" * 7)))[0] == "龘" * 7  # characters of several tokens stay whole
        whole = len(t.encode("酒店。很好"))
        assert asked(t, "酒店。很好", whole) == ("酒店。很好", None)


def test_the_system_text_of_a_long_prompt_stays_where_there_is_room(tok, glm):
    question = "这本书不好看。" * 20 + "电脑很好"
    for t in (tok, glm):
        text, note = asked(t, question, 60, system="你好")
        assert note == "cut question" and text.startswith("你好\n这本书不好看。这本书") and text.endswith("电脑很好")
        text, note = asked(t, "电脑很好", 20, system=question)
        assert note == "cut question" and text.startswith("这本书不好看。") and text.endswith("\n电脑很好")


def test_prompts_drop_turns_before_they_cut(tok):
    messages = chat("房间", "很好", "书", system="你好")
    whole, last = encode_prompt(tok, messages), encode_prompt(tok, chat("书", system="你好"))
    assert fit_prompt(tok, messages, len(whole)) == (whole, None)
    assert fit_prompt(tok, messages, len(whole) - 1) == (last, "dropped turns")
    assert fit_prompt(tok, messages, len(last) - 1)[1] == "cut question"
    assert fit_prompt(tok, messages, 1) == (None, "no room for the question")


def test_the_system_text_stays_in_training_too(tok):
    question, answer = "酒店很好。" + "房间" * 9, "干净" * 5
    room = len(tok.encode("你好\n" + "房间" * 9)) + len(tok.encode(answer)) + 2
    messages = [*chat("书", "很好", question, answer, system="你好")]
    examples, note, lost = encode_examples(tok, messages, room)
    assert (note, lost) == ("split; cut question", 0)
    assert [tok.decode(e.ids) for e in examples] == ["你好\n书很好", "你好\n" + "房间" * 9 + answer]


def trained(tok, example):
    """The answers with loss, in order."""
    ids = [i for i, bit in zip(example.ids, example.loss_mask, strict=True) if bit]
    return [tok.decode(part) for part in split_at(ids, tok.eos_id)]


def split_at(ids, end):
    parts = [[]]
    for i in ids:
        parts[-1].append(i)
        if i == end:
            parts.append([])
    assert parts.pop() == []
    return parts


def test_a_long_conversation_is_split_at_turns(tok):
    assert [len(tok.encode(text)) for text in ("AAAA", "S\nAAAA")] == [4, 6]  # a token a letter; a turn has 10
    texts = [letter * 4 for letter in "ABCDEFGHIJ"]
    messages = chat(*texts, system="S")
    whole, _ = encode_example(tok, messages)
    assert len(whole.ids) == 52 and encode_examples(tok, messages, 52) == ([whole], None, 0)
    assert [example.ids for example in encode_examples(tok, messages, 32)[0]] == [
        encode_prompt(tok, messages[:6]) + tok.encode("FFFF") + [2],
        encode_prompt(tok, [messages[0], *messages[5:10]]) + tok.encode("JJJJ") + [2],
    ]
    # 32: three turns under the system text, then one as context, which has 12 of at most 16 tokens, and two more
    assert encode_examples(tok, messages, 32)[0][1].loss_mask == [0] * 12 + ([0] * 5 + [1] * 5) * 2
    assert [trained(tok, example) for example in encode_examples(tok, messages, 32)[0]] == [
        ["BBBB", "DDDD", "FFFF"],
        ["HHHH", "JJJJ"],
    ]
    # 23: two turns, and none as context, which would have 12 of at most 11
    assert [trained(tok, example) for example in encode_examples(tok, messages, 23)[0]] == [
        ["BBBB", "DDDD"],
        ["FFFF", "HHHH"],
        ["JJJJ"],
    ]
    assert [len(example.ids) for example in encode_examples(tok, messages, 23)[0]] == [22, 22, 12]
    # 24: it fits, and leaves room for one more each time
    assert [len(example.ids) for example in encode_examples(tok, messages, 24)[0]] == [22] * 4


def test_every_answer_that_fits_is_trained_once_whatever_the_length(tok):
    rng = random.Random(7)
    for _ in range(300):
        texts = [f"{i}" + "Z" * rng.choice([1, 5, 10, 40, 90]) for i in range(rng.choice([2, 6, 16]))]
        messages = chat(*texts, system=rng.choice([None, "S" * 4, "S" * 40]))
        max_len = rng.randrange(10, 120)
        examples, note, lost = encode_examples(tok, messages, max_len)
        notes = (note or "").split("; ")
        assert all(len(e.ids) == len(e.loss_mask) <= max_len for e in examples)
        fit = [
            text for text in texts[1::2] if len(tok.encode(text)) + 3 <= max_len
        ]  # a token of the question, two ends
        assert [text for e in examples for text in trained(tok, e)] == fit
        assert lost == sum(len(tok.encode(text)) + 1 for text in texts[1::2] if text not in fit)
        assert (lost > 0) == (("answer left out" in notes) or note == "answer too long") and (len(examples) > 1) == (
            "split" in notes
        )
        whole, _ = encode_example(tok, messages)
        assert (note is None) == (len(whole.ids) <= max_len) and (note is not None or examples == [whole])


def test_one_long_turn_costs_no_other(tok):
    examples, note, lost = encode_examples(tok, chat("A", "B", "C", "D" * 30, "E", "F"), 30)
    assert [trained(tok, e) for e in examples] == [["B"], ["F"]] and (note, lost) == ("split; answer left out", 31)
    examples, note, lost = encode_examples(tok, chat("A", "B", "C" * 30, "D"), 30)
    assert [trained(tok, e) for e in examples] == [["B"], ["D"]] and (note, lost) == ("split; cut question", 0)
    assert tok.decode(examples[1].ids) == "C" * 27 + "D"
    assert encode_examples(tok, chat("A", "B" * 30), 30) == ([], "answer too long", 31)


def test_an_answer_that_is_not_trained_is_context(tok):
    messages = chat("房间", "很好", "书", "不好看")
    whole, _ = encode_example(tok, messages)
    for untrained, texts in ((1, ["不好看"]), (3, ["很好"])):
        marked = [m | dict(train=False) if i == untrained else m for i, m in enumerate(messages)]
        for example, note in (encode_example(tok, marked), encode_examples(tok, marked, 100)[0:2]):
            [example] = example if isinstance(example, list) else [example]
            assert (example.ids, note) == (whole.ids, None) and trained(tok, example) == texts
    none = [m | dict(train=False) for m in messages]
    assert encode_example(tok, none) == (None, "no answer to train on")
    assert encode_examples(tok, none, 100) == ([], "no answer to train on", 0)
    # those too long make no example and lose nothing
    marked = chat("A", "B" * 30, "C", "D", "E", "F" * 30)
    marked = [m | dict(train=False) if len(m["content"]) == 30 else m for m in marked]
    [example], note, lost = encode_examples(tok, marked, 30)
    assert (tok.decode(example.ids), note, lost) == ("CD", "dropped turns", 0)


def test_both_answers_of_a_pair_stand_under_one_prompt(tok):
    messages, short, long = chat("房间", "很好", "这本书不好看。电脑very  good"), "很好", "干净，hello hello"
    prompt, answers = encode_prompt(tok, messages), [[*tok.encode(text), 2] for text in (short, long)]
    whole = len(prompt) + len(answers[1])
    pair, note, _ = encode_pair(tok, messages, [short, long], whole)
    assert note is None and [e.ids for e in pair] == [prompt + answer for answer in answers]
    assert [e.loss_mask for e in pair] == [[0] * len(prompt) + [1] * len(answer) for answer in answers]
    for less, note in ((1, "dropped turns"), (8, "cut question")):
        for order in (1, -1):
            pair, found, _ = encode_pair(tok, messages, [short, long][::order], whole - less)
            cut = fit_prompt(tok, messages, len(prompt) - less)[0]
            assert found == note and [e.ids for e in pair] == [cut + answer for answer in answers[::order]]
    assert encode_pair(tok, messages, [short, long], len(answers[1]) + 1) == (
        [],
        "answer too long",
        sum(map(len, answers)),
    )
    assert encode_pair(tok, messages, [short, ""], 100) == ([], "empty answer", 0)


def test_malformed_conversations(tok):
    assert encode_example(tok, chat("房间"), 50) == (None, "no last answer")
    assert encode_example(tok, chat("房间", ""), 50) == (None, "empty answer")
    for messages in (
        [],
        chat("a", "b")[1:],
        chat("a") * 2,
        [dict(role="tool", content="a")],
        chat(system="a"),
    ):
        assert encode_example(tok, messages, 50) == (None, "roles out of order")
        with pytest.raises(TokenizerError, match="roles out of order"):
            encode_prompt(tok, messages)
    with pytest.raises(TokenizerError, match="must be the user's"):
        encode_prompt(tok, chat("a", "b"))


# training


def train(*options):
    main([f"--{key}={value}" for key, value in options])


def test_train_writes_a_tokenizer_that_loads(corpus, tmp_path, capsys):
    out = tmp_path / "new" / "tokenizer"
    options = [("input", corpus), ("out", out), ("vocab_size", 400)]
    train(*options)
    tok = Tokenizer.load(out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "tokenizer.model", "tokenizer.vocab"]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 400 == tok.vocab_size
    vocab = (out / "tokenizer.vocab").read_text(encoding="utf-8").split("\n")
    assert [line.rsplit("\t", 1)[0] for line in vocab[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert len(vocab) == 400 + 1
    printed = capsys.readouterr().out
    assert f"100 lines, {sum(map(len, LINES)) * 20:,} characters; lines cut: none; lines skipped: none" in printed
    assert f"{characters_per_token(tok, LINES):.3f} characters per token" in printed

    with pytest.raises(TokenizerError, match="--overwrite"):
        train(*options)
    train(*options, ("overwrite", "true"))  # the same lines give the same bytes
    assert Tokenizer.load(out).model_bytes == tok.model_bytes


def test_a_killed_run_is_started_again_by_the_same_command(corpus, tmp_path):
    for event in count():
        out = tmp_path / str(event)
        again = partial(train, ("input", corpus), ("vocab_size", 400), ("out", out))
        assert killed_before(event, again, named=str(out))
        if (out / "tokenizer.model").exists():  # the last
            break
        again()
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "tokenizer.model", "tokenizer.vocab"]
    assert event > 5


def test_drawing_lines_repeats(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(f"{i} {i * i}" for i in range(2000)))
    config = train_defaults | dict(vocab_size=400, split_digits=False)
    models = [train_bpe(Corpus([str(path)], 1000), config | dict(input_sentence_size=n)) for n in (101, 101, 0)]
    assert models[0] == models[1] != models[2]


def test_characters_per_token_by_hand(tok):
    assert characters_per_token(tok, ["龘龘", "龘"]) == pytest.approx(3 / 9)  # three bytes each


def test_split_digits(corpus):
    for split, want in ((True, 3), (False, 1)):
        config = train_defaults | dict(vocab_size=420, character_coverage=1.0, split_digits=split)
        assert len(Tokenizer(train_bpe(Corpus([str(corpus)], 1000), config)).encode("123")) == want


def test_skipped_and_cut_lines_are_counted(tmp_path, capsys):
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"\xef\xbb\xbfgood\r\n\n\xff\xfebad\n" + b"x" * 21 + b"\nnul\0 left\0\n\0\n  kept spaces  ")
    lines = Corpus([str(path)], max_line_bytes=20)
    assert list(lines) == ["good", "x" * 20, "x", "nul", " left", "  kept spaces  "]
    assert lines.skipped == Counter({"empty": 2, "not UTF-8": 1})
    assert lines.cut == Counter({"at U+0000 or U+2585": 2, "longer than 20 bytes": 1})
    assert lines.lines == 6 and lines.characters == 48
    assert capsys.readouterr().out.splitlines() == [f"{path}:3: skipped, not UTF-8 (byte 0xFF at 1)"]


def test_long_lines_are_cut_after_sentences_and_nothing_is_lost():
    assert cut_line("今天。明天，后天", 24) == ["今天。明天，后天"]
    assert cut_line("今天。明天，后天", 23) == ["今天。", "明天，后天"]
    assert cut_line("今天、明天，后天", 20) == ["今天、明天，", "后天"]
    assert cut_line("today tomorrow", 9) == ["today ", "tomorrow"]
    assert cut_line("今天明天", 8) == ["今天", "明天"]  # 6 bytes, as a character is not cut
    rng = random.Random(0)
    for text in random_texts(1000, seed=4):
        pieces = cut_line(text := text * 3 + "。" + text, size := rng.randrange(4, 40))
        assert "".join(pieces) == text and all(len(piece.encode()) <= size for piece in pieces)


def test_every_line_shapes_the_vocabulary(tmp_path, capsys):
    path, out = tmp_path / "corpus.txt", tmp_path / "out"
    path.write_text("".join(LINES) * 800 + "\n" + "前\0后\u2585中\n" * 50, encoding="utf-8")
    train(("input", path), ("out", out), ("vocab_size", 420), ("character_coverage", 1.0))
    tok = Tokenizer.load(out)
    assert all(len(tok.encode(character)) == 1 for character in set("".join(LINES)) | set("前后中"))
    printed = capsys.readouterr().out
    assert "lines cut: 50 at U+0000 or U+2585, 1 longer than 16384 bytes; lines skipped: none" in printed


def test_the_space_and_ascii_are_pieces_whatever_the_corpus_holds(tmp_path):
    path, out = tmp_path / "corpus.txt", tmp_path / "out"
    path.write_text("酒店很好，房间干净\n" * 3000 + "a b\n", encoding="utf-8")
    train(("input", path), ("out", out), ("vocab_size", 370))
    tok = Tokenizer.load(out)
    assert all(len(tok.encode(chr(character))) == 1 for character in range(0x20, 0x7F))
    for text in ["空格 和▁号", "  两个空格", "a b", "▁ ▁", *TRICKY, *random_texts(1000, seed=5)]:
        assert tok.decode(tok.encode(text)) == text == stream(tok, tok.encode(text))


def test_a_foreign_vocabulary_without_a_space_gives_text_back():
    options = dict(vocab_size=275, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    tok = foreign(["酒店很好，房间干净"] * 20, **options, add_dummy_prefix=False, remove_extra_whitespaces=False)
    assert not tok.has_space and tok.changes == []
    space, mark = tok.encode(" "), tok.encode("▁")
    assert len(space) == 1 and len(mark) == 3
    assert tok.encode("好 房▁") == tok.encode("好") + space + tok.encode("房") + mark
    texts = ["空格 和▁号", "  两个空格", "a b", "▁ ▁", *TRICKY, *random_texts(1000, seed=6)]
    for text, ids in zip(texts, tok.encode_batch(texts), strict=True):
        assert ids == tok.encode(text) and tok.decode(ids) == text == stream(tok, ids)


def test_a_vocabulary_says_what_it_does_to_text(tok, glm):
    assert tok.has_space and tok.changes == []
    assert glm.has_space and glm.changes == []  # as Llama 2's: a dummy prefix comes off again
    plain = foreign(LINES * 20, vocab_size=60, model_type="unigram", hard_vocab_limit=False)
    assert 0 in plain.encode("龘")
    assert plain.changes == ["nmt_nfkc", "spaces in a row become one, those at the ends go"]


def foreign(lines, **options):
    """A tokenizer trained by SentencePiece itself."""
    model, ids = io.BytesIO(), dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **ids, **options)
    return Tokenizer(model.getvalue())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "corpus.txt: no such file"),
        (b"", "corpus.txt: the file is empty"),
        (b"\n\n", "no usable line in .*corpus.txt"),
        (b"abc\n", "vocab_size 5000 on 1 lines: .*Vocabulary size too high"),
        (
            "\n".join(map(chr, range(0x4E00, 0x7E00))).encode(),
            "vocab_size 5000: 126.. are needed, for 3",
        ),
    ],
)
def test_unusable_corpora(tmp_path, content, message):
    path, out = tmp_path / "corpus.txt", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message), ending:
        train(("input", path), ("out", out / "deeper"), ("vocab_size", 5000))
    assert not out.exists()


@pytest.mark.parametrize(
    "name, content", [("config.json", '{"model": {}}'), ("tokenizer.vocab", ""), ("config.json", "mine")]
)
def test_a_folder_of_another_stage_is_left_alone(tmp_path, name, content):
    (tmp_path / "corpus.txt").write_text("abc\n")
    (tmp_path / name).write_text(content)
    message = "config.json.* not" if name == "config.json" else f"{name} exists; give --overwrite to replace it, or"
    for overwrite in ("false", "true") if name == "config.json" else ("false",):
        with pytest.raises((TokenizerError, UserError), match=message):
            train(("input", tmp_path / "corpus.txt"), ("out", tmp_path), ("overwrite", overwrite))
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 2


def test_a_run_with_a_checkpoint_is_no_place_for_a_tokenizer(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(TokenizerError, match="ckpt.pt: a run of another stage is there: choose another --out"):
        train(("input", tmp_path / "ckpt.pt"), ("out", tmp_path), ("overwrite", "true"))


def test_the_input_and_a_file_in_place_of_the_folder_are_not_replaced(tmp_path):
    text = "\n".join(LINES * 20)
    for name in ("tokenizer.vocab", "tokenizer.model", "config.json"):
        (tmp_path / name).write_text(text if name != "config.json" else '{"character_coverage": 1}')
    (tmp_path / "link.txt").symlink_to("tokenizer.vocab")
    (tmp_path / "broken").symlink_to("nowhere")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name in before:
        with pytest.raises(TokenizerError, match=f"input .*{name}: training would replace it: choose another --out"):
            train(("input", tmp_path / name), ("out", f"{tmp_path}/../{tmp_path.name}"), ("overwrite", "true"))
    for name in (*before, "broken"):
        with pytest.raises(TokenizerError, match=f"{name}: a file, not a folder: choose another --out"):
            train(("input", tmp_path / "link.txt"), ("out", tmp_path / name), ("overwrite", "true"))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_no_input_named():
    with pytest.raises(TokenizerError, match="--input"):
        train(("input", ""))


def test_demo_config_is_the_default_with_its_own_names():
    from configs.demo.tokenizer import config

    assert config.keys() == train_defaults.keys() and config["vocab_size"] == 6144
