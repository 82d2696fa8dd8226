"""Talk to the checkpoints under a folder in a browser, or by any client of OpenAI's: chat, compare, look at the runs.

One static page and /v1/chat/completions, /v1/completions, /v1/models, streamed or not. One model is in memory, loaded
when it is asked; requests are answered in order, and one that nobody waits for any more stops within a token. It
listens on this machine alone unless --host says otherwise, which needs an --api_key. docs/web_demo.md tells the rest.

    python web_demo.py
    python web_demo.py --runs=out/demo --port=8080
    python web_demo.py --host=0.0.0.0 --api_key=a-long-secret
"""

import common.early  # noqa: F401 - before what takes seconds to import

import asyncio
import errno
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError, UserError, parse_config, run
from common.distributed import setup

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
except ImportError as error:
    print(f"error: {error}: pip install -r requirements.txt brings fastapi and uvicorn", file=sys.stderr)
    raise SystemExit(2) from None

from serving.generation import Finished, Job, Piece, Started
from serving.guard import Guard, Impatient, is_loopback, read_body
from serving.protocol import Answer, ApiError, event, parse_json, read_request, usage_of
from serving.runs import Runs
from serving.worker import Worker

ROOT = Path(__file__).resolve().parent
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE = [path for path in (ROOT / "serving/page").iterdir() if path.suffix in KINDS and path.name[0] != "."]
PAGE += [ROOT / "common/palette.css"]
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
PATIENCE = 2  # seconds until a stream begins without its first token: then what fails is told within it
HEARTBEAT = 5  # seconds between comments in a stream that waits


@dataclass
class Site:
    """What the handlers share."""

    runs: Runs
    worker: Worker
    defaults: dict  # of sampling
    limits: dict  # max_body, max_messages, max_characters


class EventStream(StreamingResponse):
    """A stream that ends its job, however it ends itself."""

    def __init__(self, site, job, chunks):
        super().__init__(chunks, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.site, self.job = site, job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.site.worker.cancel(self.job)


async def complete(site: Site, request: Request, chat: bool) -> Response:
    """Answer a request for a chat or text completion."""
    values = parse_json(await read_body(request, site.limits["max_body"]))
    wanted = read_request(values, chat, site.defaults, site.limits)
    entry = await run_in_threadpool(site.runs.model, wanted.model)
    events, loop = asyncio.Queue(), asyncio.get_running_loop()
    address = request.client.host if request.client else ""
    job = Job(entry.path, wanted, lambda each: loop.call_soon_threadsafe(events.put_nowait, each), address)
    site.worker.submit(job)
    response = None
    try:
        if wanted.stream:
            response = EventStream(site, job, stream(site, job, events, await first_of(events)))
            return response
        return await whole_answer(job, events, request)
    finally:
        if response is None:
            site.worker.cancel(job)


async def first_of(events):
    """The first event, or None if it takes long; an error is raised, as the response can still say so."""
    try:
        first = await asyncio.wait_for(events.get(), PATIENCE)
    except asyncio.TimeoutError:
        return None
    if isinstance(first, ApiError):
        raise first
    return first


async def stream(site, job, events, each):
    """The server-sent events of a reply; `each` is the first of `events`, or None."""
    answer, started = Answer(job.wanted), None
    for chunk in answer.opening():
        yield event(chunk)
    while True:
        try:
            each = each or await asyncio.wait_for(events.get(), HEARTBEAT)
        except asyncio.TimeoutError:
            yield f": {site.worker.ahead(job)} before this one\n\n".encode()
            continue
        if isinstance(each, ApiError):
            yield event(each.body)
            return
        if isinstance(each, Started):
            started = each
        elif isinstance(each, Piece):
            yield event(answer.chunk(each.text, each.tokens))
        else:
            for chunk in answer.closing(each.reason, usage_of(started.prompt_tokens, each.tokens), facts(job, started)):
                yield event(chunk)
            yield event("[DONE]")
            return
        each = None


async def whole_answer(job, events, request):
    """The response with all of a reply, or none where the client leaves before."""

    async def leaving():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        events.put_nowait(None)

    text, tokens, left = "", [], asyncio.ensure_future(leaving())
    try:
        while not isinstance(each := await events.get(), Finished):
            if each is None:
                return Response(status_code=499)  # nginx's number for it; nobody reads it
            if isinstance(each, ApiError):
                raise each
            if isinstance(each, Started):
                started = each
            else:
                text, tokens = text + each.text, tokens + each.tokens
    finally:
        left.cancel()
    usage = usage_of(started.prompt_tokens, each.tokens)
    return JSONResponse(Answer(job.wanted).whole(text, tokens, each.reason, usage, facts(job, started)))


def facts(job, started):
    """What a reply tells beside OpenAI's fields."""
    return dict(seed=job.wanted.seed) | (dict(note=started.note) if started.note else {})


def add_interface(app: FastAPI, site: Site) -> None:
    """OpenAI's paths."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await complete(site, request, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await complete(site, request, chat=False)

    @app.get("/v1/models")
    def models():
        return JSONResponse(dict(object="list", data=[entry.json() for entry in site.runs.usable()]))

    @app.get("/v1/models/{name:path}")
    def model(name: str):
        return JSONResponse(site.runs.model(name).json())


def add_page(app: FastAPI, site: Site) -> None:
    """The page and what only it asks for. Its files are read once: no path of a request is opened."""
    files = {f"/{path.name}": (path.read_bytes(), KINDS[path.suffix]) for path in PAGE}
    files["/"] = files["/index.html"]

    def file(request: Request):
        content, kind = files[request.url.path]
        return Response(content, media_type=kind)

    for path in files:
        app.add_api_route(path, file, methods=["GET", "HEAD"])

    @app.get("/api/settings")
    def settings():
        return JSONResponse(dict(defaults=site.defaults, limits=site.limits))

    @app.get("/api/tree")
    def tree():
        return JSONResponse(site.runs.tree())

    @app.get("/api/runs")
    def runs():
        return JSONResponse(site.runs.runs())

    @app.get("/api/samples")
    def samples(request: Request):
        return JSONResponse(site.runs.samples(request.query_params.get("run", "")))

    @app.get("/api/plot")
    def plot(request: Request):
        content = site.runs.plot(request.query_params.get("run", ""), request.query_params.get("name", ""))
        return Response(content, media_type="image/png")


def add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(_, error: ApiError):
        wait = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers=wait)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException):
        said = ApiError(f"{request.method} {request.url.path[:100]!a}: {error.detail}", error.status_code)
        return JSONResponse(said.body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(*_):
        return JSONResponse(ApiError("internal error, of which the server's terminal tells more", 500).body, 500)


class Server(uvicorn.Server):
    """uvicorn, which lets go of what is being answered when it is stopped."""

    def __init__(self, site: Site, config: dict):
        app = FastAPI(openapi_url=None)  # whose pages of documentation load scripts from elsewhere
        for add in (add_interface, add_page):
            add(app, site)
        add_errors(app)
        guarded = Guard(app, config["host"], config["allowed_hosts"], config["api_key"])
        options = dict(http=Impatient, ws="none", lifespan="off", server_header=False, timeout_graceful_shutdown=2)
        super().__init__(uvicorn.Config(guarded, log_level="warning", access_log=False, **options))
        self.site = site

    async def shutdown(self, sockets=None):
        await run_in_threadpool(self.site.worker.close)
        await super().shutdown(sockets)


def make_site(config: dict) -> Site:
    root = Path(config["runs"])
    if root.is_file():
        raise UserError(f"--runs={root}: a file: name the folder that holds the runs")
    if not root.is_dir():
        raise UserError(f"--runs={root}: no such folder: train something first, or name the folder that holds the runs")
    return Site(
        Runs(root),
        Worker(setup(config["device"], "float32").device, config["max_queue"]),
        {key: config[key] for key in SAMPLING},
        {key: config[key] for key in ("max_body", "max_messages", "max_characters")},
    )


def check_config(config: dict) -> None:
    """ConfigError for a server that everybody could use, and for a key that no header can hold."""
    key = config["api_key"]
    if not is_loopback(config["host"]) and key is None:
        raise ConfigError(f"--host={config['host']}: others could use this server: give an --api_key too")
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("--api_key: ASCII characters without spaces are needed")


def listen(config: dict) -> socket.socket:
    """A socket on host and port, or UserError."""
    host, port = config["host"], config["port"]
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = f"port {port} is taken: give another --port" if taken else (error.strerror or error)
        raise UserError(f"--host={host} --port={port}: {why}") from None


def main(argv=None):
    config = parse_config("web_demo", argv, __doc__)
    check_config(config)
    site, server_socket = make_site(config), listen(config)
    host = f"[{config['host']}]" if ":" in config["host"] else config["host"]
    found = len(site.runs.usable())
    for entry in site.runs.entries().values():
        if entry.problem:
            print(f"{entry.id} is not served: {entry.problem}", file=sys.stderr)
    served = f"serves {found} checkpoint{'s' * (found != 1)} of {config['runs']}"
    print(f"http://{host}:{server_socket.getsockname()[1]}/ {served}", flush=True)
    Server(site, config).run(sockets=[server_socket])


if __name__ == "__main__":
    run(main)
