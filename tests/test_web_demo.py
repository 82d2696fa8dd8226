"""web_demo.py over HTTP: OpenAI's client, many clients at once, one that leaves, a hundred turns, how it starts."""

import gc
import http.client
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from chains import ROOT, make_model, start
from tiny import tiny
from web import SAMPLING, ask, client_of, served, until, user

import web_demo
from common import checkpoint
from common.config import ConfigError, UserError
from tokenizer import StreamDecoder, encode_opening, encode_prompt


@pytest.fixture(scope="module")
def loaded(runs):
    ckpt = checkpoint.load(runs / "demo" / "sft")
    return checkpoint.tokenizer_of(ckpt), checkpoint.build_model(ckpt).eval()


def expected(loaded, question, seed, n, **sampling):
    tok, model = loaded
    ids = model.generate([encode_prompt(tok, user(question))], n, **SAMPLING | sampling, seed=seed).tokens[0]
    return tok, ids


def complete_text(tok, ids):
    """The text of ids without a character that their end cuts in two."""
    return "".join(map(StreamDecoder(tok).push, ids))


# what OpenAI's client gets


def test_models_are_those_that_write(client):
    models = {model.id: model for model in client.models.list().data}
    assert set(models) == {"demo/sft", "demo/pretrain", "demo/dpo"}
    assert (models["demo/sft"].kind, models["demo/pretrain"].kind) == ("chat", "text")
    assert client.models.retrieve("demo/sft").step == 7


def test_reply_is_that_of_generate_streamed_or_not(client, loaded):
    for seed in range(4):
        tok, ids = expected(loaded, "酒店", seed, 24)
        text = complete_text(tok, ids[:-1] if ids[-1] == tok.eos_id else ids)
        whole = ask(client, "酒店", seed=seed, max_tokens=24)
        assert whole.choices[0].message.content == text
        assert whole.choices[0].finish_reason == ("stop" if ids[-1] == tok.eos_id else "length")
        n = len(ids) - (ids[-1] == tok.eos_id)
        prompt = len(encode_prompt(tok, user("酒店")))
        usage = dict(prompt_tokens=prompt, completion_tokens=n, total_tokens=prompt + n)
        assert usage.items() <= whole.usage.model_dump().items()
        *chunks, last = ask(client, "酒店", seed=seed, max_tokens=24, stream=True,
                            stream_options=dict(include_usage=True, include_obfuscation=None))  # fmt: skip
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
        assert not last.choices and last.usage == whole.usage and all(chunk.usage is None for chunk in chunks)


def test_same_seed_gives_the_same_text_and_none_tells_which_it_was(client):
    first = ask(client, "书", max_tokens=20)
    again = ask(client, "书", max_tokens=20, seed=first.seed)
    assert again.choices[0].message.content == first.choices[0].message.content
    others = {ask(client, "书", max_tokens=20, seed=seed).choices[0].message.content for seed in range(4)}
    assert len(others) > 1


def test_stop_text_is_left_out_wherever_tokens_end(client):
    text = ask(client, "书", seed=3, max_tokens=60).choices[0].message.content
    for at, size in ((5, 1), (4, 3), (9, 2)):
        stop = text[at : at + size]
        short = ask(client, "书", seed=3, max_tokens=60, stop=["从不出现的话", stop]).choices[0]
        assert (short.message.content, short.finish_reason) == (text[: text.index(stop)], "stop")
        streamed = ask(client, "书", seed=3, max_tokens=60, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text[: text.index(stop)]


@torch.no_grad()
def test_logprobs_are_the_models_own(client, loaded):
    tok, model = loaded
    reply = ask(client, "书", seed=5, max_tokens=12, logprobs=True, top_logprobs=3,
                extra_body=dict(top_k=9, min_p=0.01, repetition_penalty=1.3), temperature=0.7)  # fmt: skip
    content = reply.choices[0].logprobs.content
    ids = expected(loaded, "书", 5, 12, top_k=9, min_p=0.01, repetition_penalty=1.3, temperature=0.7)[1]
    prompt = encode_prompt(tok, user("书"))
    logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]  # (n, V)
    logps = logits.log_softmax(-1)
    text, whole = b"".join(bytes(each.bytes) for each in content), reply.choices[0].message.content
    assert content and text.decode(errors="ignore") == whole.replace("\ufffd", "")
    for i, each in enumerate(content):
        assert bytes(each.bytes) == tok.bytes_of(ids[i])
        assert each.logprob == pytest.approx(logps[i, ids[i]].item(), abs=1e-4)  # float32, cached against not
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(logps[i].topk(3).values.tolist(), abs=1e-4)


def test_a_base_model_continues_and_does_not_chat(client, runs):
    tok = checkpoint.tokenizer_of(ckpt := checkpoint.load(runs / "demo" / "pretrain"))
    model = checkpoint.build_model(ckpt).eval()
    ids = model.generate([encode_opening(tok, "酒店的")], 16, **SAMPLING, seed=2).tokens[0]
    options = dict(model="demo/pretrain", prompt="酒店的", max_tokens=16, seed=2, **SAMPLING)
    reply = client.completions.create(**options, logprobs=2).choices[0]
    assert reply.text == complete_text(tok, ids)
    assert len(reply.logprobs.tokens) == len(reply.logprobs.token_logprobs) == len(reply.logprobs.text_offset)
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)) == reply.text
    with pytest.raises(openai.BadRequestError, match="continues text, at /v1/completions"):
        ask(client, "酒店", model="demo/pretrain")


@pytest.mark.parametrize(
    "changes, param",
    [
        (dict(temperature=3), "temperature"),
        (dict(top_p=-1), "top_p"),
        (dict(extra_body=dict(min_p=1.5)), "min_p"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(n=2), "n"),
        (dict(stop=[""]), "stop"),
        (dict(top_logprobs=2), "top_logprobs"),
        (dict(logprobs=True, top_logprobs=21), "top_logprobs"),
        (dict(extra_body=dict(temprature=1)), "temprature"),
        (dict(tools=[dict(type="function", function=dict(name="f"))]), "tools"),
        (dict(messages=[]), "messages"),
        (dict(messages=user("a") + user("b")), "messages"),
        (dict(messages=[dict(role="assistant", content="a")]), "messages"),
        (dict(messages=user(["a"])), "messages[0].content"),
        (dict(messages=user("龘" * 60)), "messages"),
    ],
)
def test_what_is_wrong_is_named(client, changes, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**dict(model="demo/sft", messages=user("好")) | changes)
    assert error.value.body["type"] == "invalid_request_error" and error.value.body["param"] == param
    assert param.partition("[")[0] in error.value.body["message"]


def test_models_that_are_not_there_or_write_nothing(client):
    for name in ("demo/none", "../demo/sft", "/etc/passwd", "demo/sft/ckpt.pt", "demo/rm\x00"):
        with pytest.raises(openai.NotFoundError):
            ask(client, "好", model=name)
    with pytest.raises(openai.BadRequestError, match="not a checkpoint"):
        ask(client, "好", model="odd")


def test_oldest_turns_are_left_out_and_said_so(client):
    turns = [dict(role=role, content="好看" * 8) for role in ("user", "assistant")] * 20
    reply = client.chat.completions.create(model="demo/sft", messages=turns + user("书"), max_tokens=4)
    assert reply.note == "dropped turns" and reply.usage.prompt_tokens <= 124
    assert "note" not in ask(client, "书", max_tokens=4).model_dump()


def test_a_checkpoint_that_was_replaced_is_loaded_anew(runs, loaded, tmp_path, small):
    tok, _ = loaded
    (tmp_path / "tokenizer").symlink_to(small / "tokenizer")
    make_model(tmp_path, "sft")
    with served(tmp_path) as server:
        client = client_of(server)
        options = dict(model="sft", seed=1, max_tokens=12)
        first = ask(client, "书", **options).choices[0].message.content
        facts = dict(stage="sft", step=8, tokens_seen=9, config={}, tokenizer=tok.model_bytes)
        checkpoint.save(tmp_path / "sft", model=tiny(9, vocab_size=tok.vocab_size, max_seq_len=128), **facts)
        assert ask(client, "书", **options).choices[0].message.content != first


# many clients, and those that leave


def test_twenty_clients_get_each_their_own_answers(client, loaded):
    def talk(who):
        got = []
        for turn in range(10):
            question, seed = f"第{who}位问第{turn}个问题", 100 * who + turn
            options = dict(seed=seed, max_tokens=6, stream=turn % 2 == 0)
            reply = ask(client, question, **options)
            if options["stream"]:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
            else:
                text = reply.choices[0].message.content
            got.append((question, seed, text))
        return got

    with ThreadPoolExecutor(20) as pool:
        answers = [each for talks in pool.map(talk, range(20)) for each in talks]
    assert len(answers) == 200
    for question, seed, text in answers:
        tok, ids = expected(loaded, question, seed, 6)
        assert text == complete_text(tok, ids[:-1] if ids[-1] == tok.eos_id else ids)
    assert len({text for *_, text in answers}) > 100  # else mixing them up would not be seen


def test_a_client_that_goes_away_stops_its_generation(server, client, monkeypatch):
    lengths = {n: ask(client, "书", seed=n, max_tokens=60).usage.completion_tokens for n in range(20)}
    seed = max(lengths, key=lengths.get)
    assert lengths[seed] > 20
    worker, counted, reached = server.site.worker, [], threading.Event()
    generate = type(worker.loaded.model).generate

    def watched(self, prompts, *args, on_token, **kwargs):
        def count(row, token):
            counted.append(token)
            if len(counted) == 5:
                reached.set()
                until(lambda: worker.job.cancelled)  # the client is gone, and the server knows
            on_token(row, token)

        return generate(self, prompts, *args, on_token=count, **kwargs)

    monkeypatch.setattr(type(worker.loaded.model), "generate", watched)
    for streamed in (True, False):
        counted.clear()
        reached.clear()
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = dict(model="demo/sft", messages=user("书"), seed=seed, max_tokens=60, stream=streamed, **SAMPLING)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert reached.wait(300)
        connection.close()
        connection.sock = None
        until(lambda: worker.job is None)
        assert len(counted) == 5
    until(lambda: not worker.waiting)


def test_a_hundred_turns_take_no_more_memory(server, client):
    def turn(messages):
        messages = messages[-100:] + user("写一条好评")
        reply = client.chat.completions.create(model="demo/sft", messages=messages, max_tokens=8, logprobs=True)
        return messages + [dict(role="assistant", content=reply.choices[0].message.content)]

    def objects():
        gc.collect()
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        return len(gc.get_objects()), sum(tensor.nbytes for tensor in tensors)

    gc.collect()
    gc.freeze()  # what tests before this one left does not count: it may go meanwhile, or be of no size at all
    try:
        messages = []
        for n in range(100):
            messages = turn(messages)
            if n == 20:
                before = objects()
        after = objects()
    finally:
        gc.unfreeze()
    assert after[1] == before[1] and after[0] < before[0] + 400  # 80 turns leave fewer than five objects each
    worker = server.site.worker
    until(lambda: worker.job is None)  # a reply has come before the worker is done with it
    assert not worker.waiting


# how it starts


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(host="0.0.0.0"), ConfigError, "api_key"),
        (dict(host="example.com"), ConfigError, "api_key"),
        (dict(api_key=""), ConfigError, "ASCII"),
        (dict(api_key="密钥"), ConfigError, "ASCII"),
        (dict(runs="nowhere"), UserError, "no such folder"),
        (dict(runs="out/file"), UserError, "a file: name the folder"),
        (dict(port=70000), ConfigError, "65,535"),
    ],
)
def test_what_cannot_be_served(options, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(error, match=words):
        web_demo.main([f"--{key}={value}" for key, value in options.items()])


def test_a_port_that_is_taken(server, runs):
    with pytest.raises(UserError, match="is taken: give another --port"):
        web_demo.main([f"--runs={runs}", f"--port={server.port}"])


def test_the_command_serves_until_ctrl_c(runs):
    with start("web_demo.py", f"--runs={runs}", "--port=0", "--device=cpu", "--api_key=hidden") as process:
        try:
            line = next(line for line in process.stdout if line.startswith("http"))
            assert line.endswith(f"/ serves 3 checkpoints of {runs}\n")
            url = line.split("/ serves")[0]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="hidden", max_retries=0)
            stream = ask(client, "书", max_tokens=100, temperature=0, stream=True)
            next(iter(stream))  # a reply is on its way
        finally:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert process.returncode == 130 and "hidden" not in out
        assert err == "odd is not served: cut short or not a checkpoint\ninterrupted\n"


def test_the_page_is_files_of_ours(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    for path in sorted((ROOT / "serving" / "page").iterdir()):
        connection.request("GET", f"/{path.name}")
        assert connection.getresponse().read() == path.read_bytes()
        connection.request("HEAD", f"/{path.name}")  # as curl -I and what watches a server ask
        reply = connection.getresponse()
        assert (reply.status, reply.length, reply.read()) == (200, 0, b"")
        assert int(reply.headers["content-length"]) == path.stat().st_size
    connection.close()
