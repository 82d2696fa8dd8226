"""llama.cpp's server, as the package xllamacpp carries it, for a .gguf file: clients of OpenAI's can talk to it.

    python -m serving.llama_cpp out/demo/gguf/model.gguf --port=8080

in:  a .gguf file, as export.py writes it
out: an HTTP server on this machine's own address, until Ctrl-C
"""

import argparse
import errno
import socket
import threading
from pathlib import Path

from common import config
from common.config import ConfigError, UserError

HOST = "127.0.0.1"  # whoever wants more puts a proxy with a key in front


def serve(path: Path, port: int, **changes):
    """A running xllamacpp.Server, `listening_address` being its URL; `changes` are fields of its CommonParams."""
    try:
        import xllamacpp
    except ImportError:
        raise UserError("llama.cpp's server is in the package xllamacpp: pip install xllamacpp") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file; python export.py --format=gguf makes one of a checkpoint")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file; python export.py --format=gguf makes one of a checkpoint")
    check_port(port)
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.verbosity = str(path), port, 1
    for key, value in changes.items():
        setattr(params, key, value)
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise UserError(f"{path}: llama.cpp cannot serve it: {error}") from None


def check_port(port: int) -> None:
    """ConfigError unless a server can listen there; 0 lets the system choose."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port={port}: from 0 to 65,535")
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = f"port {port} is taken: give another --port" if taken else (error.strerror or error)
        raise UserError(f"--port={port}: {why}") from None


def main(argv=None):
    parser = argparse.ArgumentParser("python -m serving.llama_cpp", description=__doc__.split("\n")[0])
    parser.add_argument("gguf", help="the .gguf file")
    parser.add_argument("--port", type=int, default=8080, help="where it listens (8080)")
    args = parser.parse_args(argv)
    server = serve(Path(args.gguf), args.port)
    print(f"{server.listening_address}/v1 serves {args.gguf}", flush=True)
    threading.Event().wait()  # until Ctrl-C


if __name__ == "__main__":
    config.run(main)
