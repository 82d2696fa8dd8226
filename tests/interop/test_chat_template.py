"""What transformers makes of an exported folder: ids, settings, the chat template."""

import json
from functools import partial

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained
from vocabularies import LINES, SPECIAL, TRICKY, every_tokenizer

from interop.vocabulary import read_vocabulary, tokenizer_config, tokenizer_json
from tokenizer import TokenizerError, encode_example, encode_prompt


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
