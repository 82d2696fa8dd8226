"""Tokens a second of model.generate on a CPU, beside transformers, llama2.c and llama.cpp on models of the same shape.

Greedy, after 16 tokens, no end before the last one; weights are random. Every figure comes from a process of its own,
in rounds over all programs, of which the fastest counts. A program that is not here gives null.

    python benchmarks/generate.py --tokenizer=tokenizer.model --llama2c=PATH --runs=out/demo --model=sft

in:  a tokenizer of at most 32,000 pieces; a checkout of llama2.c after `make runomp`; a folder of runs and the name of
     a chat model among them, as benchmarks/serve.py takes them, for the first character
out: tokens a second and, last, one line of JSON on standard output
"""

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import (
    ROOT,
    argument_parser,
    fastest,
    flags,
    hf_config,
    launch,
    measure_llama_cpp,
    print_figures,
    read_figures,
    run_python,
)

import export
import quantize
from common import checkpoint
from configs.sizes import sizes
from model import Llama, ModelConfig

SMALL = dict(dim=288, n_layers=6, n_heads=6, n_kv_heads=6, vocab_size=32000, max_seq_len=512)  # llama2.c's stories15M
LARGE = "tiny-llama2-58m"  # for int8, which has nothing to save in a model that fits into a CPU's cache
PROMPT = list(range(3, 19))


def rate_of(generate, B, new):
    """generate(n) makes n tokens in each of B rows; the call that is timed is not the first."""
    generate(8)
    start = time.perf_counter()
    generate(new)
    return dict(rate=B * new / (time.perf_counter() - start))


def ours(path, B, new):
    model = checkpoint.build_model(checkpoint.load(path)).eval()
    return rate_of(lambda n: model.generate([PROMPT] * B, n, temperature=0, eos_id=-1), B, new)


def transformers(B, new):
    import torch
    from transformers import LlamaForCausalLM

    model, ids = LlamaForCausalLM(hf_config(ModelConfig(**SMALL))).eval(), torch.tensor([PROMPT] * B)
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0)
    return rate_of(lambda n: model.generate(ids, max_new_tokens=n, **options), B, new)


def llama2c(checkout, folder, new):
    files = [f"{checkout}/run", f"{folder}/model.bin", "-z", f"{folder}/tokenizer.bin"]
    done = subprocess.run([*files, "-t", "0", "-n", str(new)], capture_output=True)
    found = re.search(rb"tok/s: ([0-9.]+)", done.stderr)
    if found is None:
        raise SystemExit(f"{files[0]} gave no rate: {done.stderr.decode(errors='replace').strip()}")
    return dict(rate=float(found[1]))


def llama_cpp(path, new):
    return dict(rate=measure_llama_cpp(path, 512, len(PROMPT), new, rounds=1)["decode"])


def exported(ckpt, out, kind, dtype):
    with contextlib.redirect_stdout(sys.stderr):
        export.main(flags(format=kind, ckpt=ckpt, out=out, dtype=dtype))
    return out


def make_jobs(folder, tokenizer, options):
    """Files of random weights, and what is to be measured: {name: function and arguments}."""
    facts = dict(stage="pretrain", step=0, tokens_seen=0, tokenizer=tokenizer, config={})
    small, large, int8 = (folder / name / checkpoint.FILE_NAME for name in ("small", "large", "int8"))
    model = Llama(ModelConfig(**SMALL))
    model.tok_embeddings.weight.data[1] = 0  # with a logit of 0 it is never the likeliest: llama2.c ends at token 1
    checkpoint.save(small, model=model, **facts)
    checkpoint.save(large, model=Llama(ModelConfig(**sizes[LARGE])), **facts)
    low = quantize.quantize_checkpoint(checkpoint.load(large))
    checkpoint.save(int8, model=checkpoint.build_model(low), quant=quantize.INT8, **facts)
    new = options.tokens
    jobs = {f"ours, {B} row(s)": (ours, small, B, new) for B in (1, 32)}
    jobs |= {f"transformers, {B} row(s)": (transformers, B, new) for B in (1, 32)}
    jobs |= {f"ours, {LARGE}": (ours, large, 1, new), f"ours, {LARGE} int8": (ours, int8, 1, new)}
    if options.llama2c:
        jobs["llama2.c"] = llama2c, options.llama2c, exported(small, folder / "llama2c", "llama2c", "float32"), new
    with contextlib.suppress(ImportError):
        import xllamacpp  # noqa: F401

        jobs["llama.cpp F32"] = llama_cpp, exported(small, folder / "f32", "gguf", "float32") / "model.gguf", new
        jobs["llama.cpp Q8_0"] = llama_cpp, exported(large, folder / "q8_0", "gguf", "q8_0") / "model.gguf", new
    return jobs


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--tokenizer", required=True, help="SentencePiece model that every file of weights carries")
    parser.add_argument("--llama2c", help="folder that holds llama2.c's program run")
    parser.add_argument("--runs", help="folder of runs for the first character; without it null")
    parser.add_argument("--model", help="name of a chat model among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a row")
    options = parser.parse_args()
    if options.llama2c and not (Path(options.llama2c) / "run").is_file():
        parser.error(f"--llama2c={options.llama2c}: no program run in it; make runomp builds it")
    with tempfile.TemporaryDirectory() as folder:
        found = fastest(make_jobs(Path(folder), Path(options.tokenizer).read_bytes(), options), options.rounds)
    for name, result in found.items():
        print(f"{name:32s} {result['rate']:8.1f} tokens/s")

    def ratio(name, other):
        return found[name]["rate"] / found[other]["rate"] if other in found else None

    first = None
    if options.runs and options.model:
        script = ROOT / "benchmarks" / "serve.py"
        served = read_figures(run_python(script, *flags(runs=options.runs, model=options.model)))
        first = served["first_character_s"]
    figures = dict(
        decode_b1_ratio_hf=ratio("ours, 1 row(s)", "transformers, 1 row(s)"),
        decode_b1_ratio_llama2c=ratio("ours, 1 row(s)", "llama2.c"),
        decode_b1_ratio_llamacpp_f32=ratio("ours, 1 row(s)", "llama.cpp F32"),
        decode_b32_ratio_hf=ratio("ours, 32 row(s)", "transformers, 32 row(s)"),
        int8_b1_ratio_fp32=ratio(f"ours, {LARGE} int8", f"ours, {LARGE}"),
        int8_b1_ratio_q8_0=ratio(f"ours, {LARGE} int8", "llama.cpp Q8_0"),
        first_character_s=first,
    )
    print_figures(figures, 3)


if __name__ == "__main__":
    launch(main)
