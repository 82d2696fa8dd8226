"""The poet over several seeds: what DPO, PPO and GRPO gain by rules that anyone can check, and what it costs.

From one pretrained checkpoint each seed fine-tunes, trains a reward model, ranks its own replies and aligns by
configs/poems/; seed 1 is the chain of runs/poems.sh itself. Every stage answers the same requests, on titles that no
training text has, and verse/ judges. What is finished is not repeated, and what was interrupted goes on.

    bash runs/poems.sh
    python benchmarks/poems.py
    python benchmarks/poems.py --seeds=2 --steps_scale=0.05 --out=out/smoke

in:  data/poems, out/poems
out: out/seed-N with a run directory and a log of each stage, and replies.json; samples.md, twenty replies of each stage
     that nobody chose; lines of text and, last, one of JSON: lists have a value a seed
"""

import importlib
import json
import math
from pathlib import Path

from harness import ROOT, argument_parser, flags, launch, measure, print_figures, read_figures, run_python

from common.files import read_json, write_file, write_json
from common.metrics import distinct_2
from configs.poems.ranked import config as ranked_config
from corpora.poems import copied, ngrams_of
from dataset.batches import load_prompts
from dataset.formats import load_meta
from verse import judge, parse, render, rhyme_class, rhyme_entropy
from verse.tables import load_tables

# script, and the runs that it starts from, by key
STAGES = {
    "sft": ("sft", {}),
    "rm": ("rm_train", dict(init_from="sft")),
    "dpo": ("dpo_train", dict(init_from="sft")),
    "ppo": ("ppo_train", dict(init_from="sft", reward_model="rm")),
    "grpo": ("grpo_train", dict(init_from="sft")),
}
CHAIN = 1  # the seed of configs/poems
COMPARED = ["sft", "dpo", "ppo", "grpo"]
SHARES = dict(form="form", rhyme="rhyme", tones="right_tones", all_right="all_right", asked="asked")
IN_USE = dict(temperature=0.8, top_p=0.9)  # what eval_generate.py answers a prompt with
AS_TRAINED = dict(temperature=0.8, top_p=1.0)  # what a KL is defined for


def train(name, seed, options):
    """A stage's run directory, trained unless it is there."""
    if seed == CHAIN:
        return options.chain / name
    script, parents = STAGES[name]
    folder = options.out / f"seed-{seed}"
    config = importlib.import_module(f"configs.poems.{name}").config
    keys = dict(data=options.data, out=folder / name, seed=seed, device="cpu")
    keys |= dict(init_from=options.chain / "pretrain") | {key: folder / parent for key, parent in parents.items()}
    if name == "dpo":
        keys["data"] = ranked(seed, options)
    if options.steps_scale != 1:
        keys["max_steps"] = max(1, round(config["max_steps"] * options.steps_scale))
    print(f"seed {seed}: {name}", flush=True)
    command = [ROOT / f"{script}.py", ROOT / f"configs/poems/{name}.py", "--resume", *flags(**keys)]
    run_python(*command, log=folder / f"{name}.log", VERSE_TABLES=str(options.data / "rows/verse.json"))
    return folder / name


def ranked(seed, options):
    """The folder with pairs of the fine-tuned model's own replies."""
    folder = options.out / f"seed-{seed}"
    rows, data = folder / "ranked.jsonl", folder / "ranked"
    keys = dict(ckpt=folder / "sft", data=options.data, out=rows, seed=seed, device="cpu")
    if options.steps_scale != 1:
        keys["prompts"] = max(64, round(ranked_config["prompts"] * options.steps_scale))
    if not rows.exists():
        print(f"seed {seed}: ranked replies", flush=True)
        command = ["-m", "alignment.ranked", ROOT / "configs/poems/ranked.py", *flags(**keys)]
        run_python(*command, log=folder / "ranked.log", VERSE_TABLES=str(options.data / "rows/verse.json"))
    if not (data / "prompts.pkl").exists():
        sources = [f"ranked:pairs={rows}", f"requests:prompts={options.data}/rows/prompts.jsonl"]
        keys = dict(out=data, sources=sources)
        run_python(ROOT / "data_process.py", ROOT / "configs/poems/ranked_data.py", *flags(**keys))
    return data


def load_models(runs, scores=False):
    """{name: eval_generate's Loaded} of {name: run directory}."""
    from common.distributed import setup
    from eval_generate import load

    env = setup("cpu", "float32", 0)
    return {name: load(run, env, scores=scores) for name, run in runs.items()}


def continuations(run, data, n, seed):
    """The base model's texts to held-out titles, as [{"title", "text"}], and its bits per character of real poems."""
    from alignment.comparison import answer
    from tokenizer import encode_opening

    base = load_models(dict(base=run))["base"]
    poems = read_rows(Path(data) / "rows/heldout.jsonl")[: int(n)]
    prompts = [encode_opening(base.tokenizer, poem["title"] + "\n") for poem in poems]
    fitting = [len(prompt) < 60 for prompt in prompts]
    prompts, poems = ([x for x, ok in zip(xs, fitting, strict=True) if ok] for xs in (prompts, poems))
    config = dict(batch_size=50, seed=int(seed), max_new_tokens=90)
    _, texts, _ = answer(base, prompts, config, *IN_USE.values())
    rows = [dict(title=poem["title"], text=text) for poem, text in zip(poems, texts, strict=True)]
    return dict(replies=rows, real_bits=bits(base, [(p["title"], render(p["lines"])) for p in poems]))


def bits(base, pairs):
    """Bits per character of texts under the base model, each after its title: of [(title, text)]."""
    from alignment.rollout import Rollout, in_batches
    from dataset.batches import pad_batch
    from tokenizer import encode_opening

    rows = []
    for title, text in pairs:
        opening = encode_opening(base.tokenizer, title + "\n")
        whole = [*encode_opening(base.tokenizer, f"{title}\n{text}"), base.stop_id]
        same = next((i for i, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), len(opening))
        rows.append((whole, [0] * same + [1] * (len(whole) - same)))
    batch = pad_batch(rows)
    rollout = Rollout(batch["ids"], batch["lengths"], batch["loss_mask"][:, 1:], batch["lengths"] > 0, [[]] * len(rows))
    nats = -in_batches(lambda part: base.model.token_logps(part.ids, 1.0, part.mask, part.keep), rollout).sum().item()
    return nats / math.log(2) / sum(len(text) for _, text in pairs)


def replies(run, sft, rm, base, data, n, seed):
    """A run's replies to the first n held-out requests and what models say of them."""
    from alignment.comparison import answer, reply_nats, reply_scores

    loaded = load_models(dict(own=run, sft=sft, base=base))
    judge_model = load_models(dict(rm=rm), scores=True)["rm"]
    own, sft, tokenizer = loaded["own"], loaded["sft"], loaded["own"].tokenizer
    prompts = requests(data, tokenizer.vocab_size, int(n))
    config = dict(batch_size=50, seed=int(seed), max_new_tokens=40)
    batches, texts, ended = answer(own, prompts, config, *IN_USE.values())
    titled = [(p.fields["title"], text) for p, text in zip(prompts, texts, strict=True) if p.fields["title"] and text]
    found = dict(texts=texts, eos_rate=sum(ended) / len(ended), score=reply_scores(judge_model, batches).mean().item())
    found["bits"] = bits(loaded["base"], titled)
    batches, found["texts_as_trained"], _ = answer(own, prompts, config, *AS_TRAINED.values())

    def nats(model):
        return sum(reply_nats(model, batch, AS_TRAINED["temperature"]).sum().item() for batch in batches)

    return found | dict(kl=(nats(sft) - nats(own)) / len(prompts))


def requests(data, vocab_size, n):
    """The first n held-out requests, with their fields."""
    return load_prompts(Path(data) / "heldout/prompts.pkl", vocab_size)[1][:n]


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def cached(path, function, *arguments):
    """What function(*arguments) gives, in a process of its own, kept in a file."""
    if not path.exists():
        write_json(path, measure(function, *arguments))
    return read_json(path)


def by_rule(texts, asked, tables, ngrams, n_chars, real_entropy):
    """The figures of some replies to requests with these fields."""
    judged = [
        judge(text, tables, f["form"], f["rhyme"], f["heads"], f["words"]) for text, f in zip(texts, asked, strict=True)
    ]
    found = {name: mean([float(row[key]) for row in judged]) for name, key in SHARES.items()}
    classes = [rhyme_class(lines, tables) if len(lines := parse(text)) > 1 else None for text in texts]
    found["rhyme_entropy"] = rhyme_entropy(classes) / real_entropy
    found["copied"] = mean([copied(parse(text), ngrams) for text in texts])
    return found | dict(distinct_2=distinct_2(["".join(parse(text)) for text in texts], n_chars))


def mean(numbers):
    return sum(numbers) / len(numbers)


def one_seed(seed, options, tables, ngrams, poems):
    """{figure: {stage: value}} of one seed; that of real poems is "real"."""
    folder = options.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    runs = {name: train(name, seed, options) for name in STAGES}
    models = runs["sft"], runs["rm"], options.chain / "pretrain"
    given = {}
    for name in COMPARED:
        print(f"seed {seed}: replies of {name}", flush=True)
        path = folder / f"replies_{name}.json"
        given[name] = cached(path, replies, runs[name], *models, options.data, options.requests, seed)
    asked = [
        prompt.fields for prompt in requests(options.data, load_meta(options.data)["vocab_size"], options.requests)
    ]
    real_texts = [render(poem["lines"]) for poem in poems]
    entropy = rhyme_entropy([rhyme_class(poem["lines"], tables) for poem in poems])
    texts = {name: found["texts"] for name, found in given.items()}
    n_chars = min(sum(len("".join(parse(text))) for text in group) for group in [*texts.values(), real_texts])
    rows = {name: by_rule(group, asked, tables, ngrams, n_chars, entropy) for name, group in texts.items()}
    own = [dict(form=poem["form"], rhyme=None, heads="", words=[]) for poem in poems]
    rows["real"] = by_rule(real_texts, own, tables, ngrams, n_chars, entropy)
    warm = {
        name: by_rule(found["texts_as_trained"], asked, tables, ngrams, 0, entropy) for name, found in given.items()
    }
    for name, found in given.items():
        rows[name] |= {key: found[key] for key in ("kl", "score", "bits", "eos_rate")}
        rows[name] |= {f"{key}_as_trained": warm[name][key] for key in SHARES}
    figures = {key: {name: row[key] for name, row in rows.items() if key in row} for key in rows["sft"]}
    return figures, texts, asked


def samples(texts, asked):
    """Markdown of the first twenty requests that have a title, with the reply of every stage."""
    lines = ["| 要求 | " + " | ".join(texts) + " |", "|" + "---|" * (len(texts) + 1)]
    chosen = [i for i, fields in enumerate(asked) if fields["title"] and not fields["words"]][:20]
    for i in chosen:
        fields = asked[i]
        cells = [
            f"{fields['form']}《{fields['title']}》，押{fields['rhyme']}韵",
            *(group[i] for group in texts.values()),
        ]
        lines.append("| " + " | ".join(cell.replace("\n", "<br>").replace("|", "") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/poems"))
    parser.add_argument("--chain", type=Path, default=Path("out/poems"), help="what runs/poems.sh trained")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_poems"))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--requests", type=int, default=300, help="held-out requests that every stage answers")
    parser.add_argument(
        "--steps_scale", type=float, default=1.0, help="of the steps of configs/poems, for a quick look"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, tables = options.data / "rows", load_tables(options.data / "rows/verse.json")
    judged = read_figures(run_python(ROOT / "benchmarks/poems_judge.py", *flags(data=rows)))
    facts = options.chain / "pretrain", options.data, options.requests, 0
    base = cached(options.out / "base.json", continuations, *facts)
    figures = dict(base_form=mean([judge(row["text"], tables)["form"] for row in base["replies"]]))
    figures |= dict(base_rhyme=mean([judge(row["text"], tables)["rhyme"] for row in base["replies"]]))
    figures |= dict(real_bits=base["real_bits"]) | {key: judged[key] for key in ("judge_accepts", "judge_finds")}
    ngrams = ngrams_of(row["text"] for row in read_rows(rows / "poems.jsonl"))
    poems = read_rows(rows / "heldout.jsonl")[: options.requests]
    found = [one_seed(seed, options, tables, ngrams, poems) for seed in options.seeds]
    seeds = [figures_of for figures_of, _, _ in found]
    figures |= {key: {name: [seed[key][name] for seed in seeds] for name in value} for key, value in seeds[0].items()}
    _, texts, asked = found[0]
    write_file(options.out / "samples.md", samples(texts, asked).encode())
    print_figures(figures)


if __name__ == "__main__":
    launch(main)
