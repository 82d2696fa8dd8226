"""web_demo.py over HTTP: OpenAI's client, many clients at once, hostile input, one that leaves, a hundred turns."""

import gc
import http.client
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
from chains import ROOT, make_model, start
from tiny import tiny

import web_demo
from common import checkpoint
from common.config import ConfigError, UserError, parse_config
from serving import guard
from tokenizer import StreamDecoder, Tokenizer, encode_opening, encode_prompt

SAMPLING = dict(temperature=1.0, top_p=1.0, top_k=0)


def user(text):
    return [dict(role="user", content=text)]


@contextmanager
def served(root, **changes):
    """A running server of the runs under root, as its Server; `port` is where it listens."""
    config = parse_config("web_demo", [], "") | dict(runs=str(root), port=0, device="cpu") | changes
    web_demo.check_config(config)
    listening = web_demo.listen(config)
    server = web_demo.Server(web_demo.make_site(config), config)
    server.port = listening.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
    thread.start()
    try:
        until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def until(holds, seconds=300):
    """Wait until something holds; the limit is no measurement, only an end for what would never come."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small):
    """A folder with a chat model, one that continues text, a reward model and a file that is none."""
    root = tmp_path_factory.mktemp("out")
    vocabulary = Tokenizer.load(small / "tokenizer")
    facts = dict(step=7, tokens_seen=9, config={}, tokenizer=vocabulary.model_bytes)
    for seed, stage in enumerate(("sft", "pretrain", "dpo")):
        (root / "demo" / stage).mkdir(parents=True)
        model = tiny(seed, vocab_size=vocabulary.vocab_size, max_seq_len=128)
        checkpoint.save(root / "demo" / stage, stage=stage, model=model, **facts)
    (root / "demo" / "rm").symlink_to(small / "rm")  # runs may lie on another disk
    (root / "odd").mkdir()
    (root / "odd" / "ckpt.pt").write_bytes(b"no checkpoint")
    return root


@pytest.fixture(scope="module")
def server(runs):
    with served(runs) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


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


def ask(client, question, model="demo/sft", **options):
    return client.chat.completions.create(model=model, messages=user(question), **SAMPLING_OF_CLIENT | options)


SAMPLING_OF_CLIENT = dict(temperature=1.0, top_p=1.0)


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
                            stream_options=dict(include_usage=True))  # fmt: skip
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
                extra_body=dict(top_k=9, repetition_penalty=1.3), temperature=0.7)  # fmt: skip
    content = reply.choices[0].logprobs.content
    ids = expected(loaded, "书", 5, 12, top_k=9, repetition_penalty=1.3, temperature=0.7)[1]
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
    options = dict(model="demo/pretrain", prompt="酒店的", max_tokens=16, seed=2, **SAMPLING_OF_CLIENT)
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
    make_model(tmp_path_with(small, tmp_path), "sft")
    with served(tmp_path) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        options = dict(model="sft", seed=1, max_tokens=12)
        first = ask(client, "书", **options).choices[0].message.content
        facts = dict(stage="sft", step=8, tokens_seen=9, config={}, tokenizer=tok.model_bytes)
        checkpoint.save(tmp_path / "sft", model=tiny(9, vocab_size=tok.vocab_size, max_seq_len=128), **facts)
        assert ask(client, "书", **options).choices[0].message.content != first


def tmp_path_with(small, tmp_path):
    (tmp_path / "tokenizer").symlink_to(small / "tokenizer")
    return tmp_path


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


def endless(client, **options):
    """A stream of a reply that is long: no <eos>, as bias is not offered, so the seed of one that goes on."""
    for seed in range(50):
        if ask(client, "书", seed=seed, max_tokens=100).usage.completion_tokens == 100:
            return ask(client, "书", seed=seed, max_tokens=100, stream=True, **options)
    raise AssertionError("every reply is short")


def test_a_client_that_goes_away_stops_its_generation(server, client, monkeypatch):
    stream = endless(client)
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

    for _ in stream:  # the first reply, which is not watched
        pass
    monkeypatch.setattr(type(worker.loaded.model), "generate", watched)
    for streamed in (True, False):
        counted.clear()
        reached.clear()
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = dict(model="demo/sft", messages=user("书"), seed=1, max_tokens=100, stream=streamed, temperature=0)
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

    messages = []
    for n in range(100):
        messages = turn(messages)
        if n == 20:
            before = objects()
    after = objects()
    assert after[1] == before[1] and after[0] < before[0] + 400  # 80 turns leave fewer than five objects each
    assert not server.site.worker.waiting and server.site.worker.job is None


# hostile input


def raw(server, body, path="/v1/chat/completions", method="POST", **headers):
    """(status, JSON) of a request as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"Content-Type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content), dict(response.getheaders())


@pytest.mark.parametrize(
    "body, status",
    [
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe{}", 400),
        (b'{"model": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"model": "demo/sft", "seed": 1' + b"0" * 5000 + b"}", 400),
        (b'{"model": "demo/sft", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": {"$ne": 1}, "messages": []}', 400),
        (json.dumps(dict(model="demo/sft", messages=user("好" * 100_000)), ensure_ascii=False).encode(), 413),
        (json.dumps(dict(model="demo/sft", messages=user("a" * 100_000))).encode(), 400),
        (json.dumps(dict(model="demo/sft", messages=user("a") * 1001)).encode(), 400),
    ],
)
def test_bodies_that_are_none_of_ours(server, body, status):
    found, said, _ = raw(server, body)
    assert (found, said["error"]["type"]) == (status, "invalid_request_error") and said["error"]["message"]


def test_odd_text_is_text(client, loaded):
    tok, _ = loaded
    odd = [
        "</s><s>[gMASK]<bos>",
        "<script>alert(1)</script>",
        "\x00\x1b[31m\x07\u202e",
        "'; DROP TABLE--",
        "😀\u200d龘",
        "",
    ]
    for text in odd:
        reply = ask(client, text, max_tokens=4, seed=1)
        ids = encode_prompt(tok, user(text))
        assert reply.usage.prompt_tokens == len(ids) and ids.count(tok.bos_id) == 1 and tok.eos_id not in ids


@pytest.mark.parametrize(
    "headers, status, code",
    [
        (dict(Host="evil.example"), 403, "wrong_host"),
        (dict(Host="127.0.0.1.evil.example:80"), 403, "wrong_host"),
        (dict(Host="192.168.1.5"), 403, "wrong_host"),
        (dict(Host="localhost@evil.example"), 403, "wrong_host"),
        (dict(Origin="http://evil.example"), 403, "wrong_origin"),
        (dict(Origin="null"), 403, "wrong_origin"),
        (dict(Host="localhost", Origin="http://localhost:1"), 403, "wrong_origin"),
        (dict(Content_Type="text/plain"), 415, None),
    ],
)
def test_requests_of_other_sites_are_refused(server, headers, status, code):
    body = json.dumps(dict(model="demo/sft", messages=user("好"), max_tokens=1))
    found, said, _ = raw(server, body, **headers)
    assert (found, said["error"]["code"]) == (status, code)
    assert raw(server, body, Host="localhost:9", Origin="http://localhost:9")[0] == 200


def test_every_answer_forbids_scripts_of_others(server):
    for path in ("/v1/models", "/nowhere", "/v1/models/none"):
        headers = {key.lower(): value for key, value in raw(server, None, path, "GET")[2].items()}
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/../web_demo.py", "/%2e%2e/web_demo.py", "//etc/passwd", "/static/..%2f..%2fmodel.py"):
        status, said, _ = raw(server, None, path, "GET")
        assert status == 404 and said["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_of_everybody(runs):
    with served(runs, api_key="secret") as server:
        for headers in ({}, dict(Authorization="Bearer secre"), dict(Authorization="Basic secret")):
            for path in ("/v1/models", "/api/tree", "/api/runs"):
                status, said, _ = raw(server, None, path, "GET", **headers)
                assert (status, said["error"]["code"]) == (401, "invalid_api_key")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="secret", max_retries=0)
        assert ask(client, "好", max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()


def received(connection):
    """All that comes until the other side closes."""
    data = b""
    with connection:
        while part := connection.recv(65536):
            data += part
    return data


def test_slow_heads_and_bodies_are_given_up(runs, monkeypatch):
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with served(runs) as server:
        address = ("127.0.0.1", server.port)
        silent, slow = socket.create_connection(address), socket.create_connection(address)
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        body = socket.create_connection(address)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        body.sendall(head + b"Content-Length: 100\r\nConnection: close\r\n\r\n{")
        assert b"408" in received(silent) and b"408" in received(slow)
        assert b"did not come within" in received(body)
        monkeypatch.undo()
        assert raw(server, None, "/v1/models", "GET")[0] == 200


def test_a_full_queue_says_so(runs):
    with served(runs, max_queue=2) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        gate = threading.Event()
        model, server.site.worker._model = server.site.worker._model, lambda path: gate.wait() and model(path)
        with ThreadPoolExecutor(3) as pool:
            try:
                first = pool.submit(ask, client, "一", max_tokens=1)
                until(lambda: server.site.worker.job)
                second = pool.submit(ask, client, "二", max_tokens=1)
                until(lambda: server.site.worker.waiting)
                with pytest.raises(openai.RateLimitError, match="try again later"):
                    ask(client, "三", max_tokens=1)
            finally:
                gate.set()
            assert first.result().choices and second.result().choices


# how it starts


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(host="0.0.0.0"), ConfigError, "api_key"),
        (dict(host="example.com"), ConfigError, "api_key"),
        (dict(api_key=""), ConfigError, "ASCII"),
        (dict(api_key="密钥"), ConfigError, "ASCII"),
        (dict(runs="nowhere"), UserError, "no such folder"),
        (dict(port=70000), ConfigError, "65,535"),
    ],
)
def test_what_cannot_be_served(options, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
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
        assert process.returncode == 130 and err == "interrupted\n" and "hidden" not in out


def test_the_page_is_files_of_ours(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    for path in sorted((ROOT / "serving" / "page").iterdir()):
        connection.request("GET", f"/{path.name}")
        assert connection.getresponse().read() == path.read_bytes()
    connection.close()
