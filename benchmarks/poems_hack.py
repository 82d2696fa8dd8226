"""A reward that asks too little, in one picture: which rhymes the poet uses where a request names none.

From the fine-tuned poet, GRPO as in configs/poems/grpo.py but for its requests, which name no rhyme: any class is as
good as another to the rules. Beside it the poet whose requests name one, as real poems have them.

    bash runs/poems.sh
    python benchmarks/poems_hack.py

in:  data/poems, out/poems/sft, out/poems/grpo
out: out/rhymes.png; last, one line of JSON: rhyme_entropy (over that of real poems), commonest (share of the commonest
     class) and rhyme (share of poems that rhyme), each of sft and unnamed (answering requests without a rhyme) and of
     named (answering the same with one)
"""

from collections import Counter
from pathlib import Path

from harness import ROOT, argument_parser, flags, launch, print_figures, run_python
from poems import IN_USE, cached, load_models, mean, read_rows

from common.files import write_file, write_rows
from common.plots import new_figure, png
from corpora.poem_tasks import SHORT
from verse import form_of, parse, rhyme_class, rhyme_entropy
from verse.tables import load_tables

SHOWN = 16  # classes in the picture, the commonest of real poems


def unnamed(row):
    """A request and its fields as if it had named no rhyme."""
    return row | dict(prompt=row["prompt"].replace(f"，押{row['rhyme']}韵", ""), rhyme=None)


def train(options):
    """The run directory of GRPO on requests without rhymes."""
    rows, data, run = options.out / "prompts.jsonl", options.out / "data", options.out / "grpo"
    write_rows(rows, list(map(unnamed, read_rows(options.data / "rows/prompts.jsonl"))))
    if not (data / "prompts.pkl").exists():
        keys = flags(out=data, parts="prompts", sources=f"unnamed:prompts={rows}")
        run_python(ROOT / "data_process.py", ROOT / "configs/poems/data.py", *keys)
    print("grpo on requests that name no rhyme", flush=True)
    keys = flags(data=data, out=run, init_from=options.sft, device="cpu", max_steps=options.steps)
    command = [ROOT / "grpo_train.py", ROOT / "configs/poems/grpo.py", "--resume", *keys]
    run_python(*command, log=options.out / "grpo.log", VERSE_TABLES=str(options.data / "rows/verse.json"))
    return run


def replies(run, data, n, named):
    """{"texts"}: what a checkpoint answers the first n held-out requests with."""
    from alignment.comparison import answer
    from tokenizer import encode_prompt

    loaded = load_models(dict(run=run))["run"]
    rows = read_rows(Path(data) / "rows/heldout_prompts.jsonl")[: int(n)]
    asked = [row if named else unnamed(row) for row in rows]
    prompts = [encode_prompt(loaded.tokenizer, [dict(role="user", content=row["prompt"])]) for row in asked]
    return dict(texts=answer(loaded, prompts, dict(batch_size=50, seed=0, max_new_tokens=40), *IN_USE.values())[1])


def draw(shares, path):
    """Bars: the share of poems in each rhyme class, of the SHOWN commonest classes of real poems."""
    classes = [name for name, _ in shares["real poems"].most_common(SHOWN)]
    figure = new_figure(9, 3.6)
    axes, width = figure.subplots(), 0.8 / len(shares)
    for i, (label, counts) in enumerate(shares.items()):
        places = [at + (i - (len(shares) - 1) / 2) * width for at in range(len(classes))]
        axes.bar(places, [100 * counts[name] / counts.total() for name in classes], width, label=label)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_xlabel("rhyme class, by its commonest character")
    axes.set_ylabel("share of the poems that rhyme (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    write_file(path, png(figure))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/poems"))
    parser.add_argument("--sft", type=Path, default=Path("out/poems/sft"))
    parser.add_argument("--grpo", type=Path, default=Path("out/poems/grpo"))
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_poems_hack"))
    parser.add_argument("--requests", type=int, default=300, help="held-out requests that each answers")
    parser.add_argument("--steps", type=int, default=80, help="of GRPO, enough to see it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tables = load_tables(options.data / "rows/verse.json")
    runs = dict(sft=(options.sft, False), unnamed=(train(options), False), named=(options.grpo, True))
    poems = [poem["lines"] for poem in read_rows(options.data / "rows/heldout.jsonl")]
    classes = dict(real=[rhyme_class(lines, tables) for lines in poems if form_of(lines) in SHORT])
    for name, (run, named) in runs.items():
        texts = cached(options.out / f"{name}.json", replies, run, options.data, options.requests, named)["texts"]
        classes[name] = [rhyme_class(lines, tables) if len(lines := parse(text)) > 1 else None for text in texts]
    counts = {name: Counter(filter(None, found)) for name, found in classes.items()}
    labels = ("real poems", "fine-tuned (SFT)", "GRPO, no rhyme named", "GRPO, rhyme named")
    draw(dict(zip(labels, counts.values(), strict=True)), options.out / "rhymes.png")
    figures = dict(
        rhyme_entropy={name: rhyme_entropy(classes[name]) / rhyme_entropy(classes["real"]) for name in runs},
        commonest={name: max(found.values()) / found.total() for name, found in counts.items()},
        rhyme={name: mean([found is not None for found in classes[name]]) for name in classes},
    )
    print_figures(figures)


if __name__ == "__main__":
    launch(main)
