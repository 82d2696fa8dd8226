"""What the benchmarks share: the project on sys.path, Python in processes of its own, turns, the last line of JSON.

It is imported before the project's modules: Python looks for them beside a benchmark, and they are a folder above.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PREFILL = 256  # tokens of a long prompt, or the context where it is shorter
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the first, as benchmarks/ has a quantize.py too


def argument_parser(doc):
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def flags(**options):
    """--key=value of each, as the scripts of the project read them."""
    return [f"--{key}={value}" for key, value in options.items()]


def run_python(*arguments, log=None, may_refuse=False, **environment):
    """Standard output of `python *arguments`; what it says on standard error goes to the file `log`, if there is one.

    Where it fails, this process ends too, and says why. Exit code 2, which says that what it reads is not there, gives
    None if it may refuse.
    """
    command, path = [sys.executable, *map(str, arguments)], [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, path))) | environment  # -m from any folder
    with open(log, "w+", encoding="utf-8") if log else tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8")
        errors.seek(0)
        last_words = errors.read().strip()[-2000:]
    if done.returncode == 2 and may_refuse:
        return None
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{last_words}")
    return done.stdout


def read_figures(text):
    """The JSON of the last line."""
    return json.loads(text.splitlines()[-1])


def print_figures(figures, digits=None):
    """A line of JSON, its floats rounded to so many digits, if given."""
    if digits is not None:
        figures = {key: round(value, digits) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps(figures), flush=True)


def measure(function, *arguments, launcher=(), **environment):
    """What function(*arguments) of the running benchmark returns, in a process of its own; a path arrives as text."""
    worker = ["--worker", function.__name__, json.dumps(arguments, default=str)]
    return read_figures(run_python(*launcher, sys.argv[0], *worker, **environment))


def hf_config(config):
    """A ModelConfig as transformers has it: a Llama of the same shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        intermediate_size=config.hidden_dim,
        tie_word_embeddings=config.tied,
    )


def measure_llama_cpp(path, context, prompt, new, rounds=3):
    """Tokens a second of a .gguf file in llama.cpp, of the fastest round: `new` ones after `prompt`, and of a long
    prompt; and its bytes."""
    import torch
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), context, 1, 0
    params.cpuparams.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    rates = dict(decode=0.0, prefill=0.0, resident=Path(path).stat().st_size)
    for _ in range(rounds):
        for kind, length, n in (("decode", prompt, new), ("prefill", min(PREFILL, context - 2), 1)):
            ids = [3 + i % 256 for i in range(length)]
            options = dict(n_predict=n, temperature=0, ignore_eos=True, cache_prompt=False)
            timings = server.handle_completions(dict(prompt=ids, **options))["timings"]
            key = "predicted_per_second" if kind == "decode" else "prompt_per_second"
            rates[kind] = max(rates[kind], timings[key])
    return rates


def take_turns(jobs, rounds, call=measure):
    """{name: [what call(*arguments) returned in each round]} of jobs {name: arguments}.

    They take turns, so that what else the machine does slows all of them alike.
    """
    found = {name: [] for name in jobs}
    for number in range(1, rounds + 1):
        for name, arguments in jobs.items():
            print(f"round {number} of {rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(call(*arguments))
    return found


def fastest(jobs, rounds, call=measure):
    """{name: what the round with the highest rate returned}."""
    found = take_turns(jobs, rounds, call)
    return {name: max(results, key=lambda result: result["rate"]) for name, results in found.items()}


def launch(main):
    """Run main, or in a process that measure() started what it asked for, whose result is printed unless it is None."""
    if sys.argv[1:2] != ["--worker"]:
        sys.exit(main())
    name, arguments = sys.argv[2:]
    found = getattr(sys.modules["__main__"], name)(*json.loads(arguments))
    if found is not None:
        print(json.dumps(found))
