"""What a visitor of web_demo.py waits for, and what a long conversation costs the server.

Seconds from a request to the first streamed character, the first request, which loads the model, apart from the later
ones; tokens a second within a reply; resident memory after 20 and after 100 turns of one conversation.

    python benchmarks/serve.py --runs=out/demo --model=sft

in:  a folder of runs and the name of a chat model among them, as /v1/models has it
out: one line of JSON on standard output, last
"""

import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import ROOT, argument_parser, flags, launch, print_figures

QUESTION = "写一条酒店好评。"
TURNS, SETTLED = 100, 20


def stream(port, model, messages):
    """(seconds to the first character, tokens a second after it, the reply's text)."""
    body = dict(model=model, messages=messages, stream=True, stream_options=dict(include_usage=True), max_tokens=24)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    start, first, text, tokens = time.perf_counter(), None, "", 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    for line in response:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            tokens = (chunk["usage"] or {}).get("completion_tokens", 0)
            piece = chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""
            first = first or (time.perf_counter() - start if piece else None)
            text += piece
    connection.close()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: is {model} a chat model of these runs?")
    seconds = time.perf_counter() - start - (first or 0)
    return first, (tokens - 1) / seconds if first and tokens > 1 else None, text


def resident_mb(pid):
    """Resident memory of a process, which Linux tells."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024 / 1e6


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", default="out")
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    command = [sys.executable, str(ROOT / "web_demo.py"), *flags(runs=options.runs, port=0)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = next(
                (int(found[1]) for line in server.stdout if (found := re.search(r"^http.*:(\d+)/", line))), None
            )
            if port is None:
                raise SystemExit("the server did not start")
            messages, firsts, rates, memory = [], [], [], {}
            for turn in range(1, TURNS + 1):
                messages = [*messages[-20:], dict(role="user", content=QUESTION)]
                first, rate, text = stream(port, options.model, messages)
                messages.append(dict(role="assistant", content=text))
                firsts.append(first)
                rates.append(rate)
                if turn in (SETTLED, TURNS):
                    memory[turn] = resident_mb(server.pid)
        finally:
            server.terminate()
    cold, *warm = firsts
    figures = dict(
        first_character_cold_s=cold,
        first_character_s=statistics.median(filter(None, warm)),
        first_character_worst_s=max(filter(None, warm)),
        tokens_per_s=statistics.median(filter(None, rates)),
        resident_mb_after_20_turns=memory[SETTLED],
        resident_mb_after_100_turns=memory[TURNS],
    )
    print_figures(figures, 3)


if __name__ == "__main__":
    launch(main)
