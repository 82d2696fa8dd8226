"""A race on equal terms: our pretraining and fine-tuning, minimind's own scripts, and a plain loop of transformers.

The same documents and vocabulary, parameters within 5 %, the same threads and minutes, one after the other in an order
that rotates over the seeds. The clock of each starts after its first step, stands while weights are written, and ends
its schedule. Ours trains as configs/ says, but for OURS, and pretrains once more in half the time, as a schedule is low
only at its end; the others with the best of the settings that a sweep of shorter runs has tried, minimind's as it ships
and its rows packed as full as ours among them. One scorer gives the bits per character of held-out documents, each by
itself, and of held-out answers, each after the racer's own prompt, all on the same tokens. What is finished is kept in
--out and not repeated.

    bash runs/poems.sh                    # or its first three commands: the data
    git clone https://github.com/jingyaogong/minimind ../minimind     # needs its `datasets`; without it two race
    python benchmarks/race.py --minimind=../minimind
    python benchmarks/race.py --minimind=../minimind --minutes=0.3 --sft_minutes=0.1 --seeds=1 --out=out/smoke

in:  data/<corpus> and out/<corpus>/tokenizer; accelerate, transformers (requirements-dev.txt)
out: out/race.png, a folder for each run with curve.json and a log; lines of text and, last, one of JSON: bits per
     character that ours is ahead, and the share of their time after which ours, in either run, was where they ended
     (and the same without the run of half the time)
"""

import importlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
from harness import ROOT, argument_parser, launch, print_figures, read_figures, run_python

from common.files import read_json, write_json, write_rows
from common.plots import new_figure, png
from dataset.batches import PackedOrder
from dataset.corpus import Corpus
from dataset.examples import Examples
from dataset.formats import load_pkl
from interop.vocabulary import tokenizer_config, tokenizer_json
from model import Llama, ModelConfig
from tokenizer import Tokenizer

RACERS = ("ours", "minimind", "transformers")
HALF = "ours, half the time"
# pretrain.py's defaults, down to 0: what learns most of a text (docs/pretrain.md); the poems' own suit their rules
OURS = dict(momentum=0.9, embedding_rate=4.0, min_learning_rate=0.0)
STAGES = ("pretrain", "sft")
TRIED = ((1, 5e-4), (1, 1e-3), (1, 2e-3), (1, 4e-3), (1, 8e-3), (4, 4e-3))  # batches of our size, peak learning rate
TRIED_SFT = ((1, 1e-4), (1, 3e-4), (1, 1e-3), (1, 3e-3))
SHIPPED = dict(  # minimind's defaults
    pretrain=dict(max_seq_len=340, batch_size=32, accumulation_steps=8, learning_rate=5e-4),
    sft=dict(max_seq_len=768, batch_size=16, accumulation_steps=1, learning_rate=1e-5),
)
# our names of the ids 0, 1 and 2 and minimind's, and what its chats are full of: as there, one token each
NAMES = {"<unk>": "<|endoftext|>", "<s>": "<|im_start|>", "</s>": "<|im_end|>"}
ADDED = ("<think>", "</think>", "user", "assistant")


def candidates(racer, stage, options):
    """The settings that a sweep compares, [{key: value}]."""
    config = options.configs[stage]
    batch, rows = config["batch_size"], config.get("seq_len", options.model["max_seq_len"])
    tried = [
        dict(batch_size=n * batch, learning_rate=rate) for n, rate in (TRIED if stage == "pretrain" else TRIED_SFT)
    ]
    if racer == "minimind":
        return [SHIPPED[stage], *(dict(max_seq_len=rows, accumulation_steps=1) | each for each in tried)]
    return tried


def hold_out(options):
    """Write the rows that are scored, none longer than any racer's context, and how many characters they have."""
    tok, seq_len = options.tok, options.configs["pretrain"]["seq_len"]
    _, val = Examples(load_pkl(options.data / "sft.pkl")).split()
    turns = [dict(zip(("question", "answer", "prompt"), turn(val[i], tok), strict=True)) for i in spaced(val, options)]
    texts = documents(options.data, "val", tok.eos_id)
    texts = [[*texts[i], tok.eos_id][: seq_len - 1] for i in spaced(texts, options)]
    characters = dict(pretrain=sum(len(tok.decode([i for i in ids if i != tok.eos_id])) for ids in texts))
    characters["sft"] = sum(len(tok.decode(each["answer"][:-1])) for each in turns)
    write_json(options.out / "heldout.json", dict(pretrain=texts, sft=turns, characters=characters))


def write_minimind_rows(options):
    """The training text as minimind reads it: a document a row, rows packed with several, and conversations."""
    tok, out, seq_len = options.tok, options.out, options.configs["pretrain"]["seq_len"]
    texts = documents(options.data, "train", tok.eos_id)
    alone = (dict(text=tok.decode(ids)) for ids in texts)
    write_rows(out / f"rows-{SHIPPED['pretrain']['max_seq_len']}.jsonl", alone)
    cut = [ids[: seq_len - 2] for ids in texts]  # as its loader does
    packed = PackedOrder([len(ids) + 2 for ids in cut], seq_len, 1, seed=0)
    parted = f"{NAMES['</s>']}{NAMES['<s>']}"
    rows = (parted.join(tok.decode(cut[i]) for i in packed[n][0]) for n in range(packed.rows))
    write_rows(out / f"rows-{seq_len}.jsonl", (dict(text=row) for row in rows))
    train, _ = Examples(load_pkl(options.data / "sft.pkl")).split()
    write_rows(out / "chats.jsonl", (chat(*turn(train[i], tok)[:2], tok) for i in range(len(train))))


def documents(data, split, eos_id):
    """The ids of each document, without its end."""
    corpus = Corpus(data, split)
    ids = corpus.read(0, len(corpus))
    return [part[part != eos_id].tolist() for part in np.split(ids, np.flatnonzero(ids == eos_id) + 1) if len(part)]


def spaced(rows, options):
    """The numbers of at most so many rows, evenly over all of them."""
    return range(0, len(rows), -(-len(rows) // options.documents))


def turn(example, tok):
    """(question, ids of the last answer and its end, ids before it) of a conversation."""
    ids, mask = (array.tolist() for array in example)
    start = len(ids) - mask[::-1].index(0)
    return tok.decode(ids[: start - 1]), ids[start:], ids[:start]


def chat(question, answer, tok):
    nothing = dict.fromkeys(("reasoning_content", "tools", "tool_calls"))
    turns = dict(user=question, assistant=tok.decode(answer[:-1]))
    return dict(conversations=[dict(role=role, content=content) | nothing for role, content in turns.items()])


def copy_peer(options, folder):
    """minimind's checkout without its .git and data, with our vocabulary under its names and with its template."""
    for name in ("model", "trainer", "dataset"):
        shutil.copytree(options.minimind / name, folder / name, ignore=shutil.ignore_patterns("*.jsonl", "*.pth"))
    (folder / "out").mkdir()
    theirs, config = read_json(folder / "model/tokenizer_config.json"), tokenizer_config(options.tok, 4096, chat=True)
    text = json.dumps([tokenizer_json(options.tok), config], ensure_ascii=False)
    for ours, name in NAMES.items():
        text = text.replace(f'"{ours}"', f'"{name}"')
    vocabulary, config = json.loads(text)
    for i, name in enumerate(ADDED, options.tok.vocab_size):
        vocabulary["added_tokens"].append(vocabulary["added_tokens"][0] | dict(id=i, content=name, special=False))
    write_json(folder / "model/tokenizer.json", vocabulary)
    write_json(folder / "model/tokenizer_config.json", config | dict(chat_template=theirs["chat_template"]))


def run(folder, racer, stage, settings, seed, minutes, options, start=None):
    """The curve of a run, {"minutes", "bits", ...}; start: that of the run whose last weights it begins with."""
    asked = dict(racer=racer, stage=stage, settings=settings, seed=seed, seconds=60 * minutes)
    asked |= dict(after=start and start["bits"][-1])
    path = folder / "curve.json"
    if not path.exists() or (curve := read_json(path))["asked"] != asked:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if racer == "minimind":
            copy_peer(options, folder / "peer")
        job = asked | places(folder.resolve(), stage, settings, options, start)
        job |= dict(vocab_size=options.tok.vocab_size + (racer == "minimind") * len(ADDED))
        curve = dict(asked=asked, folder=str(folder.resolve())) | work("train", job, options)
        curve |= dict(bits=work("score", job, options))
        for weights in sorted(folder.glob("*.pt"))[:-1]:
            weights.unlink()
        write_json(path, curve)
    ours = Llama(ModelConfig(**options.model, vocab_size=options.tok.vocab_size)).num_params()
    if not ours / 1.05 < curve["parameters"] < ours * 1.05:
        raise SystemExit(f"{racer} has {curve['parameters']:,} parameters, ours {ours:,}: no race on equal terms")
    said = " ".join(f"{key}={value}" for key, value in settings.items())
    facts = f"{curve['parameters'] / 1e6:.2f}M parameters, {curve['steps']} steps, {curve['cores']} cores"
    last = f"{curve['bits'][-1]:.3f} bits a character after {curve['minutes'][-1]:.2f} minutes"
    print(f"{folder.relative_to(options.out)}: {last} ({facts}) {said}", flush=True)
    return curve


def places(folder, stage, settings, options, start):
    """What a process of racers.py finds where, and the shapes of the models."""
    out, model = options.out.resolve(), options.model
    rows = f"rows-{settings.get('max_seq_len')}.jsonl" if stage == "pretrain" else "chats.jsonl"
    found = dict(folder=folder, run=folder / "run", peer=folder / "peer", rows=out / rows)
    found |= dict(heldout=out / "heldout.json", config=ROOT / f"configs/{options.corpus}/{stage}.py")
    found |= dict(data=options.data.resolve(), tokenizer=options.tokenizer.resolve(), start=None)
    if start:
        before = Path(start["folder"])
        found |= dict(start=max(before.glob("*.pt")), start_run=before / "run")
    found |= dict(model=model, shape=dict(hidden_size=model["dim"], num_hidden_layers=model["n_layers"]))
    return found | dict(seq_len=options.configs["pretrain"]["seq_len"])


def work(call, job, options):
    """What racers.py finds in a process of its own."""
    environment = dict(OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    environment |= dict(HF_DATASETS_CACHE=str(options.out.resolve() / "datasets"))
    command = [ROOT / "benchmarks/racers.py", call, json.dumps(job, default=str)]
    return read_figures(run_python(*command, log=job["folder"] / f"{call}.log", **environment))


def sweep(options):
    """The best settings of each racer, {racer: {stage: settings}}, by short runs of another seed; ours has its own."""
    best = dict(ours=dict(pretrain=OURS, sft=dict(example_weight="token")))  # as the others, and what is scored
    for racer in options.racers[1:]:
        best[racer], start = {}, None
        for stage in STAGES:
            minutes, curves = options.minutes[stage] * options.sweep_share, []
            for n, settings in enumerate(candidates(racer, stage, options)):
                folder = options.out / f"sweep/{racer}-{stage}-{n}"
                curves.append(run(folder, racer, stage, settings, 0, minutes, options, start))
            start = min(curves, key=lambda curve: np.nan_to_num(curve["bits"][-1], nan=np.inf))  # nan: it diverged
            best[racer][stage] = start["asked"]["settings"]
            print(f"best of {racer}, {stage}: {best[racer][stage]}", flush=True)
    return best


def reached(curve, bits):
    """Minutes after which a curve was at so many bits, straight between its points; None if it never was."""
    points = list(zip(curve["minutes"], curve["bits"], strict=True))
    if points[0][1] <= bits:
        return points[0][0]
    for (t0, b0), (t1, b1) in pairwise(points):
        if b1 <= bits:
            return t0 + (t1 - t0) * (b0 - bits) / (b0 - b1)
    return None


def share_of_time(own, theirs):
    """The mean share of their minutes after which the soonest of our runs of a seed was where theirs ended, or None."""
    soonest = [
        min(filter(None, (reached(curve, other["bits"][-1]) for curve in ours)), default=np.nan)
        for ours, other in zip(own, theirs, strict=True)
    ]
    share = np.mean(np.divide(soonest, [other["minutes"][-1] for other in theirs]))
    return None if np.isnan(share) else round(float(share), 3)


def compare(curves, stage, racers):
    """The figures of a stage; curves {(racer, stage, seed): curve}."""
    runs = {name: [curve for key, curve in curves.items() if key[:2] == (name, stage)] for name in [*racers, HALF]}
    own = list(zip(*filter(None, (runs["ours"], runs.pop(HALF))), strict=True))  # of each seed one run or two
    ends = {racer: [curve["bits"][-1] for curve in found] for racer, found in runs.items()}
    ahead, fraction, whole = {}, {}, {}
    for racer in racers[1:]:
        ahead[racer] = round(float(np.mean(ends[racer]) - np.mean(ends["ours"])), 4)
        fraction[racer] = share_of_time(own, runs[racer])
        whole[racer] = share_of_time([ours[:1] for ours in own], runs[racer])
    finals = {racer: [round(bits, 4) for bits in found] for racer, found in ends.items()}
    figures = dict(bits_per_char=finals, bits_per_char_ahead=ahead, time_fraction=fraction)
    return figures | dict(time_fraction_without_half=whole)


def draw(curves, options):
    """Bits per character against minutes, a panel a stage, a line a run."""
    figure = new_figure(8.4, 3.8)
    for axes, stage in zip(figure.subplots(1, 2), STAGES, strict=True):
        of_stage = {key: curve for key, curve in curves.items() if key[1] == stage}
        labelled, ends = set(), [curve["bits"][-1] for curve in of_stage.values()]
        for (racer, _, _), curve in of_stage.items():
            style = "C0.--" if racer == HALF else f"C{RACERS.index(racer)}.-"
            color, label = style[:2], None if racer in labelled else racer
            axes.plot(curve["minutes"], curve["bits"], style, linewidth=1, alpha=0.8, label=label)
            axes.axhline(curve["bits"][-1], color=color, linestyle=":", linewidth=0.6)
            labelled.add(racer)
        axes.set_ylim(min(ends) - 0.1, max(ends) + 1.5 * (max(ends) - min(ends)) + 0.3)
        axes.set(xlabel="minutes", title=dict(pretrain="documents", sft="answers, after fine-tuning")[stage])
        axes.set_ylabel("bits per character, held out")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    (options.out / "race.png").write_bytes(png(figure))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--minimind", type=Path, help="folder of its checkout; none: without it")
    parser.add_argument("--corpus", choices=["poems", "demo"], default="poems", help="demo: a minute is an epoch")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--sft_minutes", type=float, default=5.0)
    parser.add_argument("--sweep_share", type=float, default=0.2, help="of these minutes, for each of its runs")
    parser.add_argument("--sweep", action="store_true", help="only the sweep")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--documents", type=int, default=1000, help="held-out ones, and answers, that are scored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="in place of data/<corpus>")
    parser.add_argument("--tokenizer", type=Path, help="in place of out/<corpus>/tokenizer")
    parser.add_argument("--out", type=Path, help="in place of out/race_<corpus>")
    options = parser.parse_args()
    options.data = options.data or Path("data") / options.corpus
    options.tokenizer = options.tokenizer or Path("out") / options.corpus / "tokenizer"
    options.out = options.out or Path(f"out/race_{options.corpus}")
    options.configs = {s: importlib.import_module(f"configs.{options.corpus}.{s}").config for s in STAGES}
    options.model = options.configs["pretrain"]["model"]
    options.tok = Tokenizer.load(options.tokenizer)
    options.minutes = dict(pretrain=options.minutes, sft=options.sft_minutes)
    options.racers = [racer for racer in RACERS if racer != "minimind" or options.minimind]
    options.out.mkdir(parents=True, exist_ok=True)
    hold_out(options)
    if options.minimind and not (options.out / "chats.jsonl").exists():
        write_minimind_rows(options)
    settings, curves = sweep(options), {}
    if options.sweep:
        print_figures(settings)
        return
    for n, seed in enumerate(options.seeds):
        turns = n % len(options.racers)
        for racer in [*options.racers[turns:], *options.racers[:turns]]:
            curve = None
            for stage in STAGES:
                folder = options.out / f"seed-{seed}/{racer}/{stage}"
                how = settings[racer][stage], seed, options.minutes[stage], options, curve
                curve = curves[racer, stage, seed] = run(folder, racer, stage, *how)
        folder, minutes = options.out / f"seed-{seed}/half", options.minutes["pretrain"] / 2
        curves[HALF, "pretrain", seed] = run(
            folder, "ours", "pretrain", settings["ours"]["pretrain"], seed, minutes, options
        )
    draw(curves, options)
    figures = compare(curves, "pretrain", options.racers)
    figures |= {f"sft_{key}": value for key, value in compare(curves, "sft", options.racers).items()}
    print_figures(figures | dict(minutes=options.minutes, settings=settings))


if __name__ == "__main__":
    launch(main)
