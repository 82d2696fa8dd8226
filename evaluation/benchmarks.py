"""A checkpoint on benchmarks: what is right with its interval, beside what guessing gives with its own.

A `loaded` is eval_generate.py's Loaded: ckpt, tokenizer, model, and whether it `continues` text.
"""

import math
import random
import sys
import time
from pathlib import Path

from common import checkpoint
from common.config import ConfigError
from common.metrics import TextLoss, wilson_interval
from common.tables import format_table
from dataset.formats import DataError
from evaluation import heldout, multiple_choice
from evaluation.multiple_choice import BENCHMARKS
from evaluation.scoring import Row, by_character, by_own_likelihood, chosen, score, score_rows

LETTER, CHARACTER, OWN = "by letter", "by text, per character", "by text, beyond its own likelihood"
COLUMNS = {"scored": "{scored}", "right": "{right} of {n}", "accuracy": "{accuracy:.1%}"}
COLUMNS |= {"95 % interval": "{low:.1%} to {high:.1%}"}
COLUMNS |= {"a guess": "{chance:.1%}, 95 % within {chance_low:.1%} to {chance_high:.1%}"}


def tally(questions, choices):
    """Of Questions and the choices made of them: right, of how many, and as shares with 95 % intervals.

    Guessing gives `chance`; the interval of that is where guesses on so many questions fall.
    """
    n = len(questions)
    right = sum(choice == question.answer for choice, question in zip(choices, questions, strict=True))
    low, high = wilson_interval(right, n)
    chances = [1 / len(question.choices) for question in questions]
    chance, half = sum(chances) / n, 1.96 * math.sqrt(sum(p * (1 - p) for p in chances)) / n
    row = dict(n=n, right=right, accuracy=right / n, low=low, high=high, chance=chance)
    return row | dict(chance_low=max(0.0, chance - half), chance_high=min(1.0, chance + half))


def in_words(row):
    """What a tally shows, or that it shows nothing."""
    span = f"{row['low']:.1%} to {row['high']:.1%}"
    if row["low"] <= row["chance"] <= row["high"]:
        return f"{row['accuracy']:.1%} proves nothing: its interval, {span}, holds the {row['chance']:.1%} of a guess."
    side = "above" if row["low"] > row["chance"] else "below"
    return (
        f"{row['accuracy']:.1%} is {side} chance: its interval, {span}, lies {side} the {row['chance']:.1%} of a guess."
    )


def tallies(name, questions, scores):
    """{scoring: [a tally of each group, then of all]} of {scoring: choices}."""
    groups = dict.fromkeys(question.group for question in questions)
    found = {}
    for scored, choices in scores.items():
        pairs = list(zip(questions, choices, strict=True))
        rows = []
        for group in [*groups, "all"]:
            these = [pair for pair in pairs if group in (pair[0].group, "all")]
            rows.append(dict(benchmark=name, scored=scored, group=group) | tally(*map(list, zip(*these, strict=True))))
        found[scored] = rows
    return found


def group_table(found, title):
    """A row for each group, a column for each scoring."""
    columns = {title: "{group}", "questions": "{n}", "a guess": "{chance_low:.0%} to {chance_high:.0%}"}
    rows = [dict(row) for row in next(iter(found.values()))]
    for i, (scored, theirs) in enumerate(found.items()):
        columns[scored] = f"{{accuracy{i}:.1%}} ({{low{i}:.0%}} to {{high{i}:.0%}})"
        for row, own in zip(rows, theirs, strict=True):
            row |= {f"{key}{i}": own[key] for key in ("accuracy", "low", "high")}
    return format_table(columns, rows)


def described(found, title):
    """[Markdown] of tallies: the whole, in words, and by group."""
    whole = [rows[-1] for rows in found.values()]
    parts = [format_table(COLUMNS, whole), *(f"{row['scored'].capitalize()}: {in_words(row)}" for row in whole)]
    n_groups = len(next(iter(found.values()))) - 1
    if n_groups > 1:
        above = [sum(row["low"] > row["chance"] for row in rows[:-1]) for rows in found.values()]
        said = ", ".join(f"{n} {scored}" for n, scored in zip(above, found, strict=True))
        parts.append(f"Above chance on its own, of {n_groups}: {said}; guessing would put about one in forty there.")
        parts.append(group_table(found, title))
    return parts


def cut_words(cut, n, limit):
    return f" {cut} of {n} were longer than the context of {limit} tokens and lost their left." if cut else ""


def fit(loaded, choices):
    """Whether each of some choices is of at least one token and less than the context."""
    return all(0 < len(loaded.tokenizer.encode(choice)) < loaded.model.config.max_seq_len for choice in choices)


def prepare(loaded, name, path, documents, config):
    """(what is asked, the split or none, how many do not fit): all that may fail, before anything is scored."""
    if name in BENCHMARKS:
        items, split = multiple_choice.load(name, path, config["subjects"], config["shots"])
        letters = "text" not in config["scoring"]
        fitting = [item for item in items if letters or fit(loaded, multiple_choice.texts(item[2]))]
        if not fitting:
            raise DataError(f"{path}: no question's options fit the context; --scoring=letter needs none of them")
        return fitting, split, len(items) - len(fitting)
    if name == "bits":
        if not any(any(excerpt.pieces for excerpt in heldout.excerpts_of(texts)) for texts in documents.values()):
            raise DataError(f"bits: no text in the documents of {', '.join(documents)}")
        return documents, None, 0
    questions = heldout.ask(name, documents, config["questions"], config["seed"])
    fitting = [question for question in questions if fit(loaded, question.choices)]
    if not fitting:
        why = "none of whose choices fits the context" if questions else "from which no question can be made"
        raise DataError(f"{name}: documents {why}: {', '.join(documents)}")
    return fitting, None, len(questions) - len(fitting)


def multiple_choice_part(loaded, name, path, asked, config):
    """([Markdown], [tally]) of C-Eval or CMMLU."""
    benchmark, shots = BENCHMARKS[name], config["shots"]
    items, split, others = asked
    model, tok, limit = loaded.model, loaded.tokenizer, loaded.model.config.max_seq_len
    # as the exported tokenizer does, which the harness uses: a chat model's puts nothing before a text
    opening = [tok.opening_id] if loaded.continues else []

    scores, parts = {}, []
    if "letter" in config["scoring"]:
        questions = [multiple_choice.ask_letters(*item) for item in items]
        found = score(model, tok, questions, opening)
        scores[LETTER] = chosen(found.logps)
        counts = ", ".join(f"{letter} {scores[LETTER].count(i)}" for i, letter in enumerate("ABCD"))
        parts.append(f"Letters chosen: {counts}.{cut_words(found.cut, len(questions), limit)}")
    if "text" in config["scoring"]:
        questions = [multiple_choice.ask_texts(*item) for item in items]
        alone = [question._replace(context="答案：") for question in questions]
        found, unasked = (score(model, tok, each, [tok.opening_id]) for each in (questions, alone))
        scores[CHARACTER] = chosen(by_character(found.logps, questions))
        scores[OWN] = chosen(by_own_likelihood(found.logps, unasked.logps))
        parts.append(f"Asked without the options.{cut_words(found.cut, len(questions), limit)}")
    found = tallies(name, questions, scores)
    head = f"## {benchmark.title}\n\n{len(questions)} questions ({split}) of {path}, {shots} shots."
    head += f" {others} with an option that does not fit the context were left out." * bool(others)
    return [head, *described(found, "subject"), *parts], [row for rows in found.values() for row in rows]


def heldout_part(loaded, name, asked):
    """([Markdown], [tally]) of a task made from held-out documents."""
    model, tok = loaded.model, loaded.tokenizer
    title, _ = heldout.TASKS[name]
    fitting, _, others = asked
    found = score(model, tok, fitting, [tok.opening_id])
    scores = {CHARACTER: chosen(by_character(found.logps, fitting))}
    if any(question.context for question in fitting):
        alone = score(model, tok, [question._replace(context="") for question in fitting], [tok.opening_id])
        scores[OWN] = chosen(by_own_likelihood(found.logps, alone.logps))
    head = f"## {name}\n\n{title[0].upper()}{title[1:]}: {len(fitting)} questions."
    head += f" {others} did not fit." * bool(others)
    head += cut_words(found.cut, len(fitting), model.config.max_seq_len)
    found = tallies(name, fitting, scores)
    return [head, *described(found, "source")], [row for rows in found.values() for row in rows]


def bits_part(loaded, documents, config):
    """([Markdown], [figures]) of the bits per character of each source's documents, in excerpts."""
    model, tok, limit, rows = loaded.model, loaded.tokenizer, loaded.model.config.max_seq_len, []
    for source, texts in documents.items():
        excerpts = ["".join(excerpt.pieces) for excerpt in heldout.excerpts_of(texts)]
        excerpts = random.Random(f"{config['seed']} bits {source}").sample(
            excerpts, min(config["questions"], len(excerpts))
        )
        windows = []
        for ids in tok.encode_batch(excerpts):
            ids = [tok.opening_id, *ids]
            windows += [ids[i : i + limit + 1] for i in range(0, len(ids) - 1, limit)]
        if not windows:
            continue
        found = score_rows(model, [Row(ids[:-1], [[]], [ids[1:]], 0) for ids in windows])
        nats, tokens = -sum(row[0] for row in found), sum(len(ids) - 1 for ids in windows)
        loss = TextLoss(nats, tokens, sum(map(len, excerpts)))
        rows.append(dict(benchmark="bits", group=source, characters=loss.characters, bits_per_char=loss.bits_per_char))
    columns = {"source": "{group}", "characters": "{characters:,}", "bits per character": "{bits_per_char:.3f}"}
    return ["## bits\n\nBits per character of excerpts of each source.", format_table(columns, rows)], rows


def parse(items):
    """[(name, path or None)] of ["ceval", "cmmlu=PATH", "order", "PATH", ...].

    A path by itself is a folder where those without one of their own are looked for.
    """
    named, folders, tasks = [], [], [*heldout.TASKS, "bits"]
    for item in map(str, items):
        name, equals, path = item.partition("=")
        if name in BENCHMARKS and (path or not equals):
            named.append((name, path or None))
        elif name in tasks and not equals:
            named.append((name, None))
        elif equals or not Path(item).is_dir():
            raise ConfigError(f"benchmark={item}: {', '.join([*BENCHMARKS, *tasks])}, NAME=PATH or a folder is needed")
        else:
            folders.append(item)
    if len(folders) > 1:
        raise ConfigError(f"benchmark={','.join(folders)}: at most one folder by itself; else write NAME=PATH")
    if folders and all(name not in BENCHMARKS for name, _ in named):
        there = [name for name, each in BENCHMARKS.items() if multiple_choice.files_of(each, Path(folders[0]))]
        if not there:
            layouts = " or ".join(f"{each.title}, such as {each.layout}" for each in BENCHMARKS.values())
            raise DataError(f"{folders[0]}: no questions of {layouts}")
        named = [(name, None) for name in there] + named
    if twice := next((name for i, (name, _) in enumerate(named) if name in dict(named[:i])), None):
        raise ConfigError(f"benchmark: {twice} is named twice")
    default = {name: folders[0] if folders else f"hf:{each.hub}" for name, each in BENCHMARKS.items()}
    return [(name, path or default.get(name)) for name, path in named]


def check_subjects(subjects, names):
    known = [subject for name in names if name in BENCHMARKS for subject in BENCHMARKS[name].subjects]
    if unknown := next((subject for subject in subjects if subject not in known), None):
        raise ConfigError(f"subjects={unknown}: not a subject of {' or '.join(names)}")


def measure(loaded, config):
    """(Markdown, figures) of the benchmarks that the config asks for."""
    if not config["scoring"]:
        raise ConfigError("scoring=: letter, text or both are needed")
    asked = parse(config["benchmark"])
    names, parts, rows = [name for name, _ in asked], [], []
    check_subjects(config["subjects"], names)
    documents, most = {}, 4 * config["questions"]  # not every document asks every question
    if any(name not in BENCHMARKS for name in names):
        if config["documents"]:
            documents = heldout.of_files(config["documents"], most, config["seed"])
        else:
            documents = heldout.of_data(config["data"], loaded.tokenizer, loaded.ckpt.path, most, config["seed"])
    prepared = [prepare(loaded, name, path, documents, config) for name, path in asked]
    for (name, path), questions in zip(asked, prepared, strict=True):
        began = time.monotonic()
        with checkpoint.naming(loaded.ckpt):
            if name in BENCHMARKS:
                markdown, found = multiple_choice_part(loaded, name, path, questions, config)
            elif name == "bits":
                markdown, found = bits_part(loaded, documents, config)
            else:
                markdown, found = heldout_part(loaded, name, questions)
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
        parts += markdown
        rows += found
    head = f"{loaded.ckpt.path} (stage {loaded.ckpt.stage}), seed {config['seed']}."
    return "\n\n".join([head, *parts]), dict(checkpoint=config["ckpt"], stage=loaded.ckpt.stage, benchmarks=rows)
