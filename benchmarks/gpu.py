"""A GPU in one command of at most seven minutes: is all right on it, how fast is it, how much memory does it take.

First a device in bfloat16 beside the CPU in float64 (gpu_checks.py): the step of every stage, generation, low bits.
Then tokens a second, the share of the matrix products' peak, measured in the same run, and peak memory: a training step
of the five sizes, eager and compiled, decoding, a step of PPO and of GRPO, DDP and FSDP2 in a world of one; beside
transformers, where it is installed. Ids and weights are random; a batch that does not fit is halved.

    python benchmarks/gpu.py --out=out/gpu.md
    python benchmarks/gpu.py --device=cpu --tiny      # all of it at toy sizes, to see that it runs

Each part is printed as it ends. One that raises, crashes or hangs is recorded and the rest goes on in a new process;
one for which the time left is too short is left out. Exit code 1 where a check failed.

out: tables in Markdown and, last, one line of JSON on standard output: null is what was left out
"""

import faulthandler
import importlib.util
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from gpu_checks import all_checks, failed
from gpu_speed import REAL, RL_STAGES, TINY, decode, forget, measure_device, reinforce, run_distributed, train
from harness import argument_parser, launch, print_figures

from common import distributed
from common.config import UserError
from common.files import write_file
from common.tables import format_table

RESULT = '{"part": '  # how a worker's line begins that is not meant for people


def all_parts(tiny):
    """{name: (seconds that it may take, function, its arguments after env and scale)}, the most wanted first."""
    scale = TINY if tiny else REAL
    parts = {"device": (8, measure_device)}
    parts |= {f"check: {name}": (30 if "compiled" in name else 8, run_check, name) for name in all_checks()}
    for kind, seconds in (("eager", 10), ("compiled", 40)):
        parts |= {f"train {size}, {kind}": (seconds, train, size, kind) for size in scale["sizes"]}
    for program in ("ours", "transformers"):
        for size in scale["decoded"]:
            parts |= {f"decode {size} x {B}, {program}": (12, decode, size, program, B) for B in scale["batches"]}
    parts |= {f"step of {stage}": (20, reinforce, stage) for stage in RL_STAGES}
    parts |= {f"check: {kind} in a world of one": (20, run_distributed, kind) for kind in ("ddp", "fsdp")}
    # last, as it compiles longest
    return parts | {f"train {size}, transformers": (60, train, size, "transformers") for size in scale["sizes"]}


def run_check(env, scale, name):
    function, *arguments = all_checks()[name]
    return function(env, *arguments)


def run_parts(names, device, tiny, deadline):
    """Run these parts in this process, a line of JSON each as it ends; one that raises is the last."""
    torch.manual_seed(0)
    try:
        env = distributed.setup(device, "bfloat16" if device == "cpu" else "auto")
    except UserError as error:
        print(error)
        sys.exit(2)
    if tiny:  # to generate code takes minutes on a few slow cores: what is traced runs as it is
        torch.compiler.set_stance(force_backend="aot_eager")
    parts, scale = all_parts(tiny), TINY if tiny else REAL
    for name in names:
        seconds, function, *arguments = parts[name]
        left = deadline - time.time()
        found = dict(skipped=f"{left:.0f} s are left")
        if left > seconds:
            limit = left if device == "cpu" else min(left, 30 + 2 * seconds)
            # one that hangs ends the process, not the run
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
            forget(env)
            start = time.perf_counter()
            try:
                found = dict(figures=function(env, scale, *arguments))
            except Exception as error:
                traceback.print_exc()
                found = dict(failed=traceback.format_exception_only(error)[-1].strip().splitlines()[0])
            found["seconds"] = time.perf_counter() - start
            faulthandler.cancel_dump_traceback_later()
        print(json.dumps(dict(part=name) | found), flush=True)
        if "failed" in found:
            return


def results_of(names, options, deadline):
    """{part: its result} of a new process that runs these parts, as far as it comes; printed as they come."""
    arguments = json.dumps([names, options.device, options.tiny, deadline])
    command = [sys.executable, __file__, "--worker", "run_parts", arguments]
    results = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        for line in process.stdout:
            if line.startswith(RESULT):
                result = json.loads(line)
                name = result.pop("part")
                results[name] = result
                print(describe(name, result), flush=True)
                if "failed" in result or len(results) == len(names):
                    process.kill()  # it has nothing left to do, and what failed may keep it from ending
            else:
                print(line, end="", flush=True)
    if process.returncode == 2:  # there is no such device, it says
        sys.exit(2)
    if len(results) < len(names) and not any("failed" in result for result in results.values()):
        name = names[len(results)]
        results[name] = dict(failed=f"the process ended with exit code {process.returncode}, or hung")
        print(describe(name, results[name]), flush=True)
    return results


def describe(name, result):
    """A line for people."""
    if "figures" not in result:
        kind = "failed" if "failed" in result else "skipped"
        return f"{name}: {kind}: {result[kind]}"
    figures = result["figures"]
    texts = [f"{key} {value if isinstance(value, str) else format(value, ',.4g')}" for key, value in figures.items()]
    wrong = "".join(f", WRONG: {key}" for key in failed(figures))
    return f"{name}: {', '.join(texts)}{wrong} ({result['seconds']:.1f} s)"


def table(results, peak):
    """What docs/gpu.md shows, in Markdown."""
    kinds = ("train", "decode", "step", "check")
    found = [dict(part=name) | result["figures"] for name, result in results.items() if "figures" in result]
    rows = {kind: [row for row in found if row["part"].startswith(kind)] for kind in kinds}
    for row in rows["train"]:
        row["share"] = row["flops"] / peak
    for row in rows["check"]:
        bounded = [key for key in row if f"{key}_bound" in row]
        row["found"] = "; ".join(f"{key} {row[key]:.2g} (at most {row[f'{key}_bound']:g})" for key in bounded)
    columns = dict(
        train={"training": "{part}", "rows x tokens": "{batch} x {tokens}", "tokens/s": "{rate:,.0f}"}
        | {"of the peak": "{share:.1%}", "memory (GB)": "{peak_gb:.2f}"},
        decode={"decoding": "{part}", "tokens/s": "{rate:,.0f}", "memory (GB)": "{peak_gb:.2f}"},
        step={"reinforcement": "{part}", "replies": "{replies}", "tokens each": "{length:.0f}"}
        | {"experience (s)": "{experience_s:.2f}", "updates (s)": "{update_s:.2f}", "memory (GB)": "{peak_gb:.2f}"},
        check={"check": "{part}", "off by": "{found}"},
    )
    return "\n\n".join(format_table(columns[kind], rows[kind]) for kind in kinds if rows[kind])


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes and no time to measure anything")
    parser.add_argument("--minutes", type=float, default=7.0, help="what is not done by then is left out")
    parser.add_argument("--out", type=Path, help="file for the tables; else they are printed")
    options = parser.parse_args()
    deadline = time.time() + 60 * options.minutes
    names = list(all_parts(options.tiny))
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: it is not measured")
        names = [name for name in names if not name.endswith("transformers")]
    results = {}
    while len(results) < len(names):
        results |= results_of([name for name in names if name not in results], options, deadline)
        if time.time() > deadline:
            results |= {name: dict(skipped="no time is left") for name in names if name not in results}
    peak = results["device"].get("figures", {}).get("flops", float("nan"))
    text = table(results, peak)
    if options.out:
        write_file(options.out, (text + "\n").encode())
    else:
        print(f"\n{text}\n")
    wrong = {name: keys for name, result in results.items() if (keys := failed(result.get("figures", {})))}
    errors = {name: result["failed"] for name, result in results.items() if "failed" in result}
    figures = {name: results.get(name, {}).get("figures") for name in all_parts(options.tiny)}
    print_figures(figures | dict(failed=errors, wrong=wrong))
    return int(any(name.startswith("check") for name in errors) or bool(wrong))


if __name__ == "__main__":
    launch(main)
