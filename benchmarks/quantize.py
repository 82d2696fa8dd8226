"""What each quantization costs and saves in bytes, speed and perplexity, beside llama.cpp's formats of the same model.

Quality is measured on a trained checkpoint, speed on it and on a larger one of random weights: a demo model fits into
the cache of a CPU, where few bits have little to save. Every speed is measured in a process of its own, as the idle
threads of one library slow the other, in rounds over all formats, of which the best counts. llama.cpp's quality is that
of its weights, dequantized into our model; it also rounds activations to 8 bits, which is not counted.

    python benchmarks/quantize.py --ckpt=out/demo/pretrain --data=data/demo --out=out/demo/benchmark

in:  a float32 checkpoint, its val.*.bin and train.*.bin; xllamacpp (requirements-dev.txt)
out: out/{quantize.md, quantize.png}; the tables and, last, one line of JSON on standard output
"""

import contextlib
import math
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import gguf
import torch
from harness import PREFILL, argument_parser, launch, measure_llama_cpp, print_figures, take_turns

import export
import quantize
from common import checkpoint
from common.distributed import setup
from common.metrics import source_losses
from common.plots import new_figure, png
from common.tables import format_table
from configs.quantize import config as defaults
from configs.sizes import sizes
from interop import exchange
from lowbit.layers import LowBitWeight
from model import Llama, ModelConfig

ROUNDS, NEW_TOKENS, PROMPT = 3, 100, 16
RECIPES = {"int8": quantize.INT8}
for algorithm in ("rtn", "gptq"):
    for group_size in (32, 64):
        name = f"int4 {algorithm.upper()} g{group_size}"
        RECIPES[name] = dict(
            method="int4", group_size=group_size, symmetric=False, algorithm=algorithm, int8=defaults["int8_layers"]
        )
LLAMA_CPP = {"llama.cpp Q8_0": "q8_0", "llama.cpp Q4_0": "q4_0"}
COLUMNS = {
    "format": "{format}",
    "file (bytes)": "{file:,}",
    "of float32": "{ratio:.3f}",
    "resident (bytes)": "{resident:,}",
    "decode (tokens/s)": "{decode:.0f}",
    "prefill (tokens/s)": "{prefill:.0f}",
}
QUALITY = {
    "perplexity": "{perplexity:.2f}",
    "rise": "{rise:+.3%}",
    "KL to float32 (nats/token)": "{kl:.5f}",
    "top-1 agreement": "{top1:.2%}",
}


def resident_bytes(model):
    """Bytes of all weights in memory, those that the kernels packed for this CPU included."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in model.modules():
        if isinstance(layer, LowBitWeight) and layer.made:
            cells = (cell.cell_contents for cell in layer.made[1].__closure__ or ())
            tensors += [value for value in cells if isinstance(value, torch.Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@torch.no_grad()
def measure_ours(path, dtype):
    """Tokens per second and bytes of a checkpoint, in this process."""
    model = checkpoint.build_model(checkpoint.load(path)).to(getattr(torch, dtype)).eval()
    prompt = list(range(3, 3 + PROMPT))
    model.generate([prompt], 10, temperature=0, eos_id=-1)  # packs the kernels' weights
    decode, prefill, n = 0.0, 0.0, min(PREFILL, model.config.max_seq_len)
    ids = torch.arange(n)[None] % model.config.vocab_size
    for _ in range(3):
        start = time.perf_counter()
        new = len(model.generate([prompt], NEW_TOKENS, temperature=0, eos_id=-1).tokens[0])
        middle = time.perf_counter()
        model.head(model.hidden(ids)[:, -1])
        decode = max(decode, new / (middle - start))
        prefill = max(prefill, n / (time.perf_counter() - middle))
    return dict(decode=decode, prefill=prefill, resident=resident_bytes(model))


def measure_all(jobs):
    """{format: rates}, each rate the best of ROUNDS rounds."""
    return {
        name: {key: max(rates[key] for rates in rounds) for key in rounds[0]}
        for name, rounds in take_turns(jobs, ROUNDS).items()
    }


def write_formats(ckpt, folder, recipes, batches):
    """Files of every format: {format: path}, and {format: model} of those that are ours or llama.cpp's weights."""
    files, models = {"float32": folder / "float32" / checkpoint.FILE_NAME}, {"float32": checkpoint.build_model(ckpt)}
    facts = dict(stage=ckpt.stage, step=ckpt.step, tokens_seen=ckpt.tokens_seen, tokenizer=ckpt.tokenizer, config={})
    checkpoint.save(files["float32"], model=models["float32"], **facts)
    models["bfloat16"] = checkpoint.build_model(ckpt).to(torch.bfloat16)
    files["bfloat16"] = folder / "bfloat16.pt"
    torch.save(models["bfloat16"].state_dict(), files["bfloat16"])
    for name, quant in recipes.items():
        models[name] = checkpoint.build_model(quantize.quantize_checkpoint(ckpt, quant))
        if quant.get("algorithm") == "gptq":
            options = dict(damping=defaults["damping"], act_order=defaults["act_order"])
            with contextlib.redirect_stdout(sys.stderr):
                quantize.calibrate(
                    models[name], ckpt.weights, batches, quant, search=defaults["range_search"], **options
                )
        files[name] = folder / name.replace(" ", "-") / checkpoint.FILE_NAME
        checkpoint.save(files[name], model=models[name], quant=quant, **facts)
    for name, dtype in LLAMA_CPP.items():
        out = folder / dtype
        with contextlib.redirect_stdout(sys.stderr):
            export.main(["--format=gguf", f"--ckpt={files['float32']}", f"--out={out}", f"--dtype={dtype}"])
        files[name] = out / "model.gguf"
        models[name] = dequantized(files[name], ckpt)
    return files, {name: model.eval() for name, model in models.items()}


def dequantized(path, ckpt):
    """Our model with the weights that a .gguf file holds."""
    model = Llama(ModelConfig(**ckpt.model_config))
    ours = {exchange.renamed(name, 2): name for name in model.state_dict()}
    tensors = gguf.GGUFReader(path).tensors
    weights = {ours[t.name]: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in tensors}
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def compare(models, val, env):
    """{format: validation perplexity, its rise, mean KL(float32 || format) and top-1 agreement on 64 of its rows}."""
    reference, rows = models["float32"], {}
    x, _ = val.batch(0, min(64, max(1, len(val) // reference.config.max_seq_len)), reference.config.max_seq_len, seed=0)
    for name, model in models.items():
        print(f"quality: {name}", file=sys.stderr, flush=True)
        perplexity, kl, same = source_losses(model, val, env)[0].perplexity, 0.0, 0
        for ids in x.split(4):
            p, q = (m(ids).float().log_softmax(-1) for m in (reference, model))
            kl += (p.exp() * (p - q)).sum().item()
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        rows[name] = dict(perplexity=perplexity, kl=kl / x.numel(), top1=same / x.numel())
    for row in rows.values():
        row["rise"] = row["perplexity"] / rows["float32"]["perplexity"] - 1
    return rows


def jobs_of(files, context):
    """What measures the speed of the files of write_formats: {format: function and arguments}."""
    jobs = {name: (measure_ours, path, "float32") for name, path in files.items()}
    jobs["bfloat16"] = measure_ours, files["float32"], "bfloat16"
    return jobs | {name: (measure_llama_cpp, files[name], context, PROMPT, NEW_TOKENS) for name in LLAMA_CPP}


def draw(rows, path):
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    order = sorted(rows, key=lambda row: row["rise"])
    gaps = [math.inf, *(b["rise"] - a["rise"] for a, b in pairwise(order)), math.inf]
    for row, (below, above) in zip(order, pairwise(gaps), strict=True):
        at = row["file"] / 1e6, 100 * row["rise"]
        axes.scatter(*at, color="C1" if row["format"] in LLAMA_CPP else "C0")
        where = (6, 4) if above >= below else (6, -12)  # a label goes to the side whose neighbour is farther
        axes.annotate(row["format"], at, where, textcoords="offset points")
    axes.set_xlabel("file (MB)")
    axes.set_ylabel("rise of validation perplexity over float32 (%)")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    path.write_bytes(png(figure))


def table_rows(files, rates, float32_bytes):
    sizes_of = {name: path.stat().st_size for name, path in files.items()}
    return [
        dict(format=name, file=sizes_of[name], ratio=sizes_of[name] / float32_bytes, **rates[name]) for name in files
    ]


def figures_of(by, large_by, size):
    """What the last line tells, from the rows {format: row} of the trained model and of the large one of that size."""
    gptq, rtn, q4_0 = (by[name]["rise"] for name in ("int4 GPTQ g64", "int4 RTN g64", "llama.cpp Q4_0"))
    return dict(
        int8_bytes_ratio=by["int8"]["ratio"],
        int8_ppl_rise=by["int8"]["rise"],
        int8_decode_ratio_fp32=large_by["int8"]["decode"] / large_by["float32"]["decode"],
        int8_decode_ratio_llamacpp_q8_0=large_by["int8"]["decode"] / large_by["llama.cpp Q8_0"]["decode"],
        int4_bytes_ratio=by["int4 GPTQ g64"]["ratio"],
        int4_rtn_ppl_rise=rtn,
        int4_gptq_ppl_rise=gptq,
        llamacpp_q4_0_ppl_rise=q4_0,
        gptq_rise_over_rtn=gptq / rtn,
        gptq_rise_over_q4_0=gptq / q4_0,
        decode_model=size,
        trained_int8_decode_ratio_fp32=by["int8"]["decode"] / by["float32"]["decode"],
        trained_int8_decode_ratio_llamacpp_q8_0=by["int8"]["decode"] / by["llama.cpp Q8_0"]["decode"],
    )


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--ckpt", default="out/demo/pretrain", help="float32 checkpoint, trained for minutes at least")
    parser.add_argument("--data", default="data/demo", help="folder of its val.*.bin and train.*.bin")
    parser.add_argument("--out", default="out/demo/benchmark", help="folder for the table and the picture")
    parser.add_argument(
        "--size", default="tiny-llama2-58m", choices=sizes, help="random model for the second speed table"
    )
    options = parser.parse_args()
    env, data, out = setup("cpu", "float32"), Path(options.data), Path(options.out)
    ckpt = checkpoint.load(options.ckpt)
    val = quantize.open_val(data, ckpt, checkpoint.tokenizer_of(ckpt))
    context = ckpt.model_config["max_seq_len"]
    calibration = defaults["calibration_tokens"], context, defaults["eval_batch_size"]
    batches = quantize.calibration_batches(data, defaults["calibration"], *calibration, ckpt.model_config["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        files, models = write_formats(ckpt, Path(folder) / "trained", RECIPES, batches)
        quality = compare(models, val, env)
        float32_bytes = 4 * models["float32"].num_params()
        del models
        rows = table_rows(files, measure_all(jobs_of(files, context)), float32_bytes)
        rows = [row | quality[row["format"]] for row in rows]

        large = Llama(ModelConfig(**sizes[options.size]))
        random_ckpt = Path(folder) / "random" / checkpoint.FILE_NAME
        facts = dict(stage="pretrain", step=0, tokens_seen=0, tokenizer=ckpt.tokenizer, config={})
        checkpoint.save(random_ckpt, model=large, **facts)
        fast = {name: RECIPES[name] for name in ("int8", "int4 RTN g64")}
        files, _ = write_formats(checkpoint.load(random_ckpt), Path(folder) / "large", fast, None)
        speed = table_rows(files, measure_all(jobs_of(files, large.config.max_seq_len)), 4 * large.num_params())
    by, large_by = ({row["format"]: row for row in some} for some in (rows, speed))
    out.mkdir(parents=True, exist_ok=True)
    draw(rows, out / "quantize.png")
    cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    text = "\n\n".join(
        [
            f"{options.ckpt}: {float32_bytes // 4:,} parameters, {len(val):,} validation tokens, {cpu}.",
            format_table(COLUMNS | QUALITY, rows),
            f"{options.size}, random weights: {large.num_params():,} parameters.",
            format_table(COLUMNS, speed),
        ]
    )
    (out / "quantize.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n")
    print_figures(figures_of(by, large_by, options.size), 5)


if __name__ == "__main__":
    launch(main)
