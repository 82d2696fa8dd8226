"""Every format's vocabulary against SentencePiece: tokenizer.json, the chat template, GGUF, llama2.c."""

import io
import json
import random
import struct
from functools import partial

import pytest
import sentencepiece
from jinja2.exceptions import TemplateError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as HuggingFace
from transformers import AutoTokenizer
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from configs.tokenizer import config as train_defaults
from interop.vocabulary import (
    BYTE,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    gguf_vocabulary,
    llama2c_vocabulary,
    read_vocabulary,
    tokenizer_config,
    tokenizer_json,
)
from tokenizer import Tokenizer, TokenizerError, encode_example, encode_prompt
from tokenizer.train import Corpus, train_bpe

LINES = [
    "酒店很好，房间干净",
    "这本书不好看",
    "电脑 very  good 123",
    "hello hello world",
    "</s> and <s> and <0x41>",
    "<unk>",
]
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


NAMES = ["ours", "unigram", "normalising", "glm", "tok512"]


@pytest.fixture
def tok(request):
    return request.getfixturevalue(request.param)


every_tokenizer = pytest.mark.parametrize("tok", NAMES, indirect=True)


def edited(tok, change):
    """A tokenizer with one thing changed in its model."""
    model = sentencepiece_model_pb2.ModelProto.FromString(tok.model_bytes)
    change(model)
    return Tokenizer(model.SerializeToString())


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


# transformers


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    def write(tok, chat):
        """The folder of an exported model, but for its weights."""
        folder = tmp_path_factory.mktemp("export")
        (folder / "tokenizer.model").write_bytes(tok.model_bytes)
        for name, content in {
            "config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "tokenizer.json": tokenizer_json(tok, None if chat else tok.opening_id),
            "tokenizer_config.json": tokenizer_config(tok, 512, chat=chat),
        }.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="module")
def load(folder_of):
    return lambda tok, chat=True: AutoTokenizer.from_pretrained(folder_of(tok, chat))


@every_tokenizer
def test_auto_tokenizer_gives_our_ids(load, tok):
    chat, base = load(tok), load(tok, chat=False)
    for text in TRICKY + LINES[:3]:
        ids = tok.encode(text)
        assert chat(text)["input_ids"] == chat(text, add_special_tokens=False)["input_ids"] == ids
        assert base(text)["input_ids"] == [tok.opening_id, *ids]
        assert base(text, add_special_tokens=False)["input_ids"] == ids
        assert chat.decode(ids) == base.decode(ids, skip_special_tokens=True) == tok.decode(ids)


def test_tokenizer_config(load, ours):
    reference = load(ours)
    assert (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id) == (1, 2, 0)
    assert (reference.model_max_length, len(reference)) == (512, ours.n_pieces)
    base = load(ours, chat=False)
    assert (base.bos_token_id, base.eos_token_id, base.chat_template) == (2, 2, None)
    # transformers 5.23 goes by tokenizer.json and needs neither of these; other releases do
    assert [tokenizer_config(ours, 512, chat=chat)["add_bos_token"] for chat in (True, False)] == [False, True]
    assert tokenizer_config(ours, 512, chat=True)["model_input_names"] == ["input_ids", "attention_mask"]


@every_tokenizer
def test_converters_are_told_whether_a_space_goes_before_a_text(folder_of, tok):
    """llama.cpp's takes it from tokenizer_config.json and puts one where nothing is said."""
    for chat in (True, False):
        config = json.loads((folder_of(tok, chat) / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config["add_prefix_space"] is read_vocabulary(tok).dummy_prefix


def test_special_pieces_typed_by_a_user(load, ours):
    """Hugging Face takes them for special tokens unless told not to."""
    reference = load(ours)
    for text in SPECIAL:
        assert reference(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert reference("</s>")["input_ids"] == [2]


# the chat template


def conversation(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    messages = [dict(role=role, content=text) for role, text in zip(roles, texts, strict=False)]
    return messages if system is None else [dict(role="system", content=system), *messages]


CONVERSATIONS = {
    "one question": conversation("写一条酒店好评。"),
    "one turn": conversation("写一条酒店好评。", "酒店很好，房间干净。"),
    "two turns": conversation("你好", "你好！", "再见", "再见。"),
    "a question after a turn": conversation("你好", "你好！", "very  good?"),
    "system": conversation("你好", "你好！", "再见", system="只说中文。"),
    "empty system": conversation("你好", system=""),
    "spaces": conversation("  a \n\n b  ", " \n ok\t ", "\n", system=" \n"),
    "empty question": conversation("", "a"),
    "half a special piece": conversation("<", "/s>", "</s", "s>"),
    "no pieces": conversation("龘", "\U0001f44b\U0001f3fd龘 \u2581", "e\u0301", "靐\u0301 \u2581"),
    "spaces around answers": conversation("a", "  b \n", "c", " \u2581 d "),
}


def in_parts(messages):
    """The same with the content of each message cut in two parts."""
    return [
        message
        | dict(content=[dict(type="text", text=part) for part in (text[: len(text) // 2], text[len(text) // 2 :])])
        for message in messages
        for text in [message["content"]]
    ]


@pytest.mark.parametrize("tok", ["ours", "glm", "tok512", "normalising"], indirect=True)
def test_template_gives_the_ids_of_our_prompt_format(load, tok):
    render = partial(load(tok).apply_chat_template, return_dict=False)
    for name, messages in CONVERSATIONS.items():
        if messages[-1]["role"] == "user":
            ids = encode_prompt(tok, messages)
        else:
            ids = encode_example(tok, messages)[0].ids
        rendered = render(messages), render(messages, add_generation_prompt=True), render(in_parts(messages))
        assert rendered == (ids, ids, ids), name


@pytest.mark.parametrize("tok", ["ours", "glm", "tok512", "normalising"], indirect=True)
def test_template_marks_the_answers_that_our_loss_is_on(load, tok):
    render = partial(load(tok).apply_chat_template, return_dict=True, return_assistant_tokens_mask=True)
    untrained = [conversation("你好", "你好！", "再见", "再见。"), conversation("a", "b", "c", "d", system="e")]
    untrained[0][1]["train"] = untrained[1][4]["train"] = False
    answered = {name: each for name, each in CONVERSATIONS.items() if each[-1]["role"] == "assistant"}
    if tok.changes:  # transformers loses count at a space that the normaliser drops
        del answered["spaces around answers"]
    for messages in (*answered.values(), *untrained):
        example, _ = encode_example(tok, messages)
        assert render(messages)["assistant_masks"] == render(in_parts(messages))["assistant_masks"] == example.loss_mask
    assert has_generation_markers(load(tok).chat_template) and is_chat_template_stop_token_trained(load(tok))


@pytest.mark.parametrize(
    "messages",
    [
        conversation(system="a"),
        conversation("a", "b")[1:],
        conversation("a") * 2,
        [dict(role="tool", content="a")],
        [*conversation("a", "b"), dict(role="system", content="c")],
    ],
)
def test_template_refuses_roles_out_of_order(load, ours, messages):
    with pytest.raises(TokenizerError, match="roles out of order"):
        encode_prompt(ours, messages)
    with pytest.raises(TemplateError, match="user and assistant in turn"):
        load(ours).apply_chat_template(messages)


@pytest.mark.parametrize(
    "message, why",
    [
        (dict(role="tool", content="a"), "Role tool is not known"),
        (dict(role="user", content=[dict(type="image_url", image_url="a")]), "Part of type image_url: .*text only"),
        (dict(role="user", content=[dict(type="text")]), "Part of type text: .*text only"),
        (dict(role="user", content=None), "must be text or a list of parts"),
        (dict(role="user", content=dict(text="a")), "must be text or a list of parts"),
        (dict(role="user"), "must be text or a list of parts"),
    ],
)
def test_template_says_what_it_does_not_know(load, ours, message, why):
    with pytest.raises(TemplateError, match=why):
        load(ours).apply_chat_template([message])


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
