"""OpenAI's client gets the same from web_demo.py and from llama.cpp's server (xllamacpp) of the exported checkpoint."""

import socket

import openai
import pytest
import torch
from chains import failure
from tiny import tiny
from web import served, user

import export
from common import checkpoint
from common.config import UserError
from serving import llama_cpp
from tokenizer import Tokenizer, encode_prompt

GREEDY = dict(temperature=0, max_tokens=12, extra_body=dict(repetition_penalty=1.0))


@pytest.fixture(scope="module")
def loaded(small, tmp_path_factory):
    """(folder of runs, tokenizer, model)"""
    vocabulary, root = Tokenizer.load(small / "tokenizer"), tmp_path_factory.mktemp("engines")
    model = tiny(1, dim=64, vocab_size=vocabulary.vocab_size, max_seq_len=128).eval()
    with torch.no_grad():
        model.head_weight[3:259] = 0  # no bytes in greedy text: half a character is told in different ways
    facts = dict(stage="sft", step=7, tokens_seen=9, config={}, tokenizer=vocabulary.model_bytes)
    (root / "sft").mkdir()
    checkpoint.save(root / "sft", model=model, **facts)
    return root, vocabulary, model


@pytest.fixture(scope="module")
def gguf(loaded):
    folder = loaded[0] / "gguf"
    export.main(["--format=gguf", f"--ckpt={loaded[0] / 'sft'}", f"--out={folder}"])
    return folder / "model.gguf"


@pytest.fixture(scope="module", params=["web_demo", "llama.cpp"])
def client(request, loaded):
    """OpenAI's client of one of the two servers."""
    if request.param == "web_demo":
        with served(loaded[0]) as server:
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        return
    xllamacpp = pytest.importorskip("xllamacpp", reason="no wheel of xllamacpp for this machine")
    float32 = xllamacpp.ggml_type.GGML_TYPE_F32  # 16 bits cost about 2e-3 nats, enough for another greedy token
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    exact = dict(cache_type_k=float32, cache_type_v=float32, flash_attn_type=off)
    try:
        server = llama_cpp.serve(request.getfixturevalue("gguf"), 0, warmup=False, verbosity=0, **exact)
    except UserError as error:
        pytest.skip(f"xllamacpp's server does not start here: {error}")
    yield openai.OpenAI(base_url=f"{server.listening_address}/v1", api_key="none", max_retries=0)
    del server


@torch.no_grad()
def test_the_client_gets_the_models_greedy_reply(client, loaded):
    _, tok, model = loaded
    name = client.models.list().data[0].id
    for question in ("写一条酒店好评。", "书"):
        prompt = encode_prompt(tok, user(question))
        ids = model.generate([prompt], 12, temperature=0.0).tokens[0]
        text, ended = tok.decode([i for i in ids if i != tok.eos_id]), ids[-1] == tok.eos_id
        whole = client.chat.completions.create(model=name, messages=user(question), **GREEDY)
        (choice,) = whole.choices
        assert (choice.message.role, choice.message.content) == ("assistant", text)
        assert choice.finish_reason == ("stop" if ended else "length")
        assert whole.usage.prompt_tokens == len(prompt)
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        chunks = list(client.chat.completions.create(model=name, messages=user(question), stream=True, **GREEDY))
        told = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert "".join(each.delta.content or "" for each in told) == text
        assert [each.finish_reason for each in told if each.finish_reason] == [choice.finish_reason]


def test_the_client_is_told_when_a_reply_is_cut(client):
    name = client.models.list().data[0].id
    whole = client.chat.completions.create(model=name, messages=user("书"), **GREEDY).choices[0].message.content
    stop = whole[2:4]
    reply = client.chat.completions.create(model=name, messages=user("书"), stop=[stop], **GREEDY).choices[0]
    assert (reply.message.content, reply.finish_reason) == (whole[: whole.index(stop)], "stop")
    short = client.chat.completions.create(model=name, messages=user("书"), **GREEDY | dict(max_tokens=2))
    assert short.usage.completion_tokens == 2 and short.choices[0].finish_reason == "length"


def test_the_client_gets_errors_as_its_own(client):
    name = client.models.list().data[0].id
    for wrong in (dict(messages=[]), dict(messages=user("书"), temperature="hot")):
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(model=name, **wrong)
        assert error.value.status_code >= 400 and error.value.body["message"]


def test_what_llama_cpp_cannot_serve_is_one_line(tmp_path, capsys):
    (tmp_path / "odd.gguf").write_bytes(b"no model")
    pytest.importorskip("xllamacpp", reason="no wheel of xllamacpp for this machine")
    for name, words in (("none.gguf", "no such file"), ("odd.gguf", "not a GGUF file")):
        assert words in failure(capsys, llama_cpp.main, [str(tmp_path / name)])


def test_a_port_that_is_no_one_s_to_have():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="is taken"):
        llama_cpp.check_port(taken.getsockname()[1])
    with pytest.raises(UserError, match="65,535"):
        llama_cpp.check_port(70000)
