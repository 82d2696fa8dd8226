"""web_demo.py against input that is none of ours: bodies, text, hosts, keys, clients that drag on."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from web import ask, client_of, raw, served, until, user

from common import checkpoint
from serving import guard
from serving.protocol import ApiError
from tokenizer import encode_prompt


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
        (b'{"\\ud800": 1}', 400),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', 404),
        (json.dumps(dict(model="demo/sft", messages=user("好" * 100_000)), ensure_ascii=False).encode(), 413),
        (json.dumps(dict(model="demo/sft", messages=user("a" * 100_000))).encode(), 400),
        (json.dumps(dict(model="demo/sft", messages=user("a") * 1001)).encode(), 400),
    ],
)
def test_bodies_that_are_none_of_ours(server, body, status):
    found, said, _ = raw(server, body)
    assert (found, said["error"]["type"]) == (status, "invalid_request_error") and said["error"]["message"]


def test_odd_text_is_text(client, runs):
    tok = checkpoint.tokenizer_of(checkpoint.load(runs / "demo" / "sft"))
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


def test_a_named_host_may_stand_behind_a_proxy():
    """Which sends a Host of its own, or one without the port of the page."""
    checked = guard.Guard(None, "127.0.0.1", ["Demo.example.com"], None)
    for host in ("127.0.0.1:8000", "demo.example.com"):
        for origin in ("https://demo.example.com", "https://demo.example.com:8443"):
            checked.check("/v1/models", [("host", host), ("origin", origin)])
        for origin in (
            "https://example.com",
            "http://127.0.0.1:1",
            "http://localhost:1",
            "https://demo.example.com.evil",
        ):
            with pytest.raises(ApiError, match="another site"):
                checked.check("/v1/models", [("host", host), ("origin", origin)])


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
        client = client_of(server, "secret")
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


def test_a_client_that_leaves_within_its_body_is_no_error_of_the_servers(runs, capfd):
    with served(runs) as server:
        leaving = socket.create_connection(("127.0.0.1", server.port))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        leaving.sendall(head + b"Content-Length: 100\r\n\r\n{")
        until(lambda: server.server_state.tasks)
        leaving.close()
        until(lambda: not server.server_state.tasks)
        assert raw(server, None, "/v1/models", "GET")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_queue_says_so(runs):
    with served(runs, max_queue=2) as server:
        client = client_of(server)
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
