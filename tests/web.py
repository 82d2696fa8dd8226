"""web_demo.py as the tests of its interface and of its page see it: runs to serve, a server, clients."""

import http.client
import json
import threading
import time
from contextlib import contextmanager

import openai
from tiny import tiny

import web_demo
from common import checkpoint
from common.config import parse_config
from tokenizer import Tokenizer

SAMPLING = dict(temperature=1.0, top_p=1.0)


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


def make_runs(root, small):
    """A folder with a chat model, one that continues text, a reward model and a file that is none."""
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


def client_of(server, key="none"):
    """OpenAI's client, which tries nothing twice."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0)


def ask(client, question, model="demo/sft", **options):
    return client.chat.completions.create(model=model, messages=user(question), **SAMPLING | options)


def raw(server, body, path="/v1/chat/completions", method="POST", **headers):
    """(status, JSON) of a request as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"Content-Type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content), dict(response.getheaders())
