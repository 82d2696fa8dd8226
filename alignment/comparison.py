"""Checkpoints beside each other on the same held-out prompts.

Replies are judged by the function that `judge` names, or by what fits the data: where sft.pkl asks for reviews of a
polarity, as the demo's does, by the snownlp package's classifier; else by a reward model, if there is one, and by how
likely the first checkpoint finds them. A `loaded` is eval_generate.py's Loaded: ckpt, tokenizer, model and stop_id, the
token that ends its replies.
"""

import math
import re
import sys
from functools import partial

import torch

from alignment.functions import call, fields_taken, find_function
from alignment.rewards import asked, check_rows, checked, score_rows
from alignment.rollout import in_batches, rollout
from alignment.tradeoff import best_of, best_of_kl, draw
from common import checkpoint, resume
from common.config import ConfigError, UserError
from common.metrics import distinct_2, share, wilson_interval
from common.plots import png
from common.tables import format_table, markdown_table
from dataset.batches import load_prompts, load_tasks
from dataset.formats import DataError

BITS = {"bits per character, by the first": "{bits_per_char:.2f}"}
JUDGED_COLUMNS = {
    "positive": {"positive": "{positive:.1%}", "95 % interval": "{positive_low:.1%} to {positive_high:.1%}"},
    "score": {"score": "{score:.3f}", "95 % interval": "{score_low:.3f} to {score_high:.3f}"} | BITS,
    "bits_per_char": BITS,
}
REPLY_COLUMNS = {
    "KL to the first (nats per reply)": "{kl:.2f}",
    "characters per reply": "{characters:.1f}",
    "distinct-2": "{distinct_2:.3f}",
    "eos rate": "{eos_rate:.1%}",
}
NAME = re.compile(r"\w+")  # what a format string takes as it is, of a judge of one's own
TAKEN = {"checkpoint", "stage", "kl", "characters", "eos_rate", "distinct_2", "bits_per_char"}  # figures of each row
TASK_COLUMNS = {
    "checkpoint": "{checkpoint}",
    "positive when asked": "{asked_positive:.1%} of {asked_positive_n}",
    "negative when asked": "{asked_negative:.1%} of {asked_negative_n}",
    "mean of both": "{asked_mean:.1%}",
    "polarity told right": "{polarity:.1%} of {polarity_n}",
    "eos rate": "{eos_rate:.1%}",
}


def answer(loaded, prompts, config, temperature, top_p=1.0):
    """Replies to id lists, batch_size at a time and the same for the same seed: [Rollout], [text], [eos came]."""
    batches, size = [], config["batch_size"]
    dtype = loaded.model.norm.weight.dtype  # float32 on a GPU too, as the log-probabilities that make up the KL
    for i in range(0, len(prompts), size):
        seeds = [config["seed"] + j for j in range(i, min(i + size, len(prompts)))]
        sampling = temperature, loaded.stop_id, seeds, top_p, dtype
        with checkpoint.naming(loaded.ckpt):
            batches.append(rollout(loaded.model, prompts[i : i + size], config["max_new_tokens"], *sampling))
    texts = [loaded.tokenizer.decode(reply) for batch in batches for reply in batch.replies]
    return batches, texts, [ended for batch in batches for ended in batch.ended.tolist()]


def reply_nats(loaded, batch, temperature):
    """-log p of each reply, by a checkpoint, summed over its tokens: (B,)."""
    logps = in_batches(lambda rows: loaded.model.token_logps(rows.ids, temperature, rows.mask, rows.keep), batch)
    return -logps.sum(1)


def reply_scores(reward_model, batches):
    """What a reward model gives the replies of some Rollouts: (N,)."""
    return torch.cat([in_batches(partial(score_rows, reward_model.model), batch) for batch in batches])


def own_judge(name, prompts, tokenizer, taken=TAKEN):
    """texts -> [{name: number}], of replies to these prompts in order, by the function that is so named.

    None of its names may be one of `taken`.
    """
    label = f"judge={name}"
    function, _ = find_function(label, name)
    passed = fields_taken(label, function, prompts[0].fields)
    questions = [asked(tokenizer, prompt) for prompt in prompts]
    fields, names = {key: [prompt.fields[key] for prompt in prompts] for key in passed}, []

    def judge(texts):
        found = call(label, function, questions, texts, fields)
        if not (isinstance(found, list) and found and all(isinstance(row, dict) and row for row in found)):
            raise ConfigError(f"{label} must return a list of dicts of numbers, one a reply")
        if any(row.keys() != found[0].keys() for row in found):
            raise ConfigError(f"{label} must return the same names for every reply")
        if names and names != list(found[0]):
            raise ConfigError(f"{label} must return the same names every time: {names}, now {list(found[0])}")
        names[:] = found[0]
        columns = {}
        for key in found[0]:
            named = isinstance(key, str) and NAME.fullmatch(key) and not key.isdecimal()  # which is a place to format
            if not named or key in taken or key.endswith(("_low", "_high")):
                raise ConfigError(f"{label}: {key!r:.40} cannot name a figure: a word is needed that the table has not")
            column = [row[key] for row in found]
            numbers = checked(f"{label}, {key}:", column, len(texts))
            columns[key] = column if all(isinstance(each, bool) for each in column) else numbers
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    return judge


def try_judge(loaded, prompts, config, taken):
    """ConfigError if one's own judge of a few short replies gives what the table cannot show."""
    config = config | dict(max_new_tokens=min(config["max_new_tokens"], 8))
    texts = answer(loaded, prompts, config, config["compare_temperature"], config["compare_top_p"])[1]
    own_columns(averages(own_judge(config["judge"], prompts, loaded.tokenizer, taken)(texts)), config, taken)


def averages(rows):
    """{name: mean, and name_low and name_high, its 95 % interval} of dicts of numbers or truths of the same names."""
    found = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows]).double()
        mean, half = values.mean().item(), 1.96 * values.std().item() / len(rows) ** 0.5 if len(rows) > 1 else math.nan
        interval = mean - half, mean + half
        if all(isinstance(row[name], bool) for row in rows):
            interval = wilson_interval(int(values.sum()), len(rows))
        found |= {name: mean, f"{name}_low": interval[0], f"{name}_high": interval[1]}
    return found


def judged(name, stage, texts, ended, kl, polarity=None, scores=None, own=None):
    """The figures of one checkpoint's replies, all but distinct-2 and bits; by the judges that there are."""
    n, row = len(texts), dict(checkpoint=name, stage=stage)
    if polarity:
        positive = sum(polarity(text) == 1 for text in texts)
        low, high = wilson_interval(positive, n)
        row |= dict(positive=positive / n, positive_low=low, positive_high=high)
    if scores is not None:
        row |= averages([dict(score=score) for score in scores.tolist()])
    if own:
        row |= averages(own(texts))
    return row | dict(kl=kl, characters=sum(map(len, texts)) / n, eos_rate=share(ended))


def best_of_replies(loaded, reward_model, prompts, config, own=None):
    """{n: (texts, [eos came], scores or None)}: of n replies to each prompt the one with the highest first number of
    the judge of one's own or, where there is none, the one that the reward model likes best.

    Fewer replies are the first of more, and the very first are those that `answer` gives anyway.
    """
    drawn, ranks = [], []
    for i in range(max(config["best_of"])):
        print(f"best of n: reply {i + 1} of {max(config['best_of'])} to each prompt", file=sys.stderr)
        settings = config | dict(seed=config["seed"] + i * len(prompts))  # `answer` takes the numbers up to the next
        sampling = config["compare_temperature"], config["compare_top_p"]
        batches, texts, ended = answer(loaded, prompts, settings, *sampling)
        scores = reply_scores(reward_model, batches).tolist() if reward_model else [math.nan] * len(texts)
        drawn.append(list(zip(texts, ended, scores, strict=True)))
        ranks.append(torch.tensor([float(next(iter(row.values()))) for row in own(texts)] if own else scores))
    found = {}
    for n in config["best_of"]:
        chosen = [drawn[i][k] for k, i in enumerate(best_of(torch.stack(ranks), n).tolist())]
        texts, ended, scores = zip(*chosen, strict=True)
        found[n] = texts, ended, torch.tensor(scores) if reward_model else None
    return found


def compare_replies(models, prompts, config, polarity, reward_model=None, own=None):
    """Each checkpoint's replies to the same prompts: [dict of figures], characters compared by distinct-2.

    With best_of the best of n replies of the first follow, of which the KL is an upper bound.
    """
    rows, replies, first = [], [], next(iter(models.values()))
    for name, loaded in models.items():
        print(f"{name}: {len(prompts)} held-out prompts", file=sys.stderr)
        batches, texts, ended = answer(loaded, prompts, config, config["compare_temperature"], config["compare_top_p"])
        temperature = config["compare_temperature"] or 1.0  # a greedy policy has no log-probabilities to compare
        mine, nats = (torch.cat([reply_nats(m, batch, temperature) for batch in batches]) for m in (loaded, first))
        scores = reply_scores(reward_model, batches) if reward_model else None
        row = judged(name, loaded.ckpt.stage, texts, ended, (nats - mine).mean().item(), polarity, scores, own)
        characters = sum(map(len, texts))
        bits = nats.sum().item() / math.log(2) / characters if characters else math.nan
        rows.append(row | dict(bits_per_char=bits))
        replies.append(texts)
    best = best_of_replies(first, reward_model, prompts, config, own) if config["best_of"] else {}
    for n, (texts, ended, scores) in best.items():
        row = judged(f"best of {n}", first.ckpt.stage, texts, ended, best_of_kl(n), polarity, scores, own)
        rows.append(row | dict(bits_per_char=math.nan))
        replies.append(texts)
    n_chars = min(sum(map(len, texts)) for texts in replies)
    rows = [row | dict(distinct_2=distinct_2(texts, n_chars)) for row, texts in zip(rows, replies, strict=True)]
    return rows, n_chars


def compare_tasks(models, tasks, config, polarity):
    """How each checkpoint does the SFT tasks, sampled as in use: [dict].

    A greedy answer tells the polarity right, word for word, or not.
    """
    rows = []
    for name, loaded in models.items():
        print(f"{name}: SFT tasks", file=sys.stderr)
        write, tell = tasks.get("write_asked", []), tasks.get("polarity", [])
        sampling = config["temperature"], config["top_p"]
        _, reviews, ended = answer(loaded, [ids for ids, _, _ in write], config, *sampling)
        _, verdicts, ended_too = answer(loaded, [ids for ids, _, _ in tell], config, 0.0)
        told = [text == loaded.tokenizer.decode(right) for text, (_, right, _) in zip(verdicts, tell, strict=True)]
        row = dict(checkpoint=name, stage=loaded.ckpt.stage) | follows(reviews, write, polarity)
        rows.append(row | dict(polarity=share(told), polarity_n=len(told), eos_rate=share(ended + ended_too)))
    return rows


def follows(reviews, examples, polarity):
    """How many reviews have the polarity that was asked for, by SnowNLP's verdict."""
    asked = [(label, polarity(text) == label) for text, (_, _, label) in zip(reviews, examples, strict=True)]
    positive, negative = ([right for label, right in asked if label == side] for side in (1, 0))
    return dict(
        asked_positive=share(positive),
        asked_positive_n=len(positive),
        asked_negative=share(negative),
        asked_negative_n=len(negative),
        asked_mean=(share(positive) + share(negative)) / 2,
    )


def samples_table(models, prompts, config):
    """Markdown of each checkpoint's replies to some prompts, sampled as in use."""
    columns = [[asked(next(iter(models.values())).tokenizer, prompt) for prompt in prompts]]
    columns += [answer(m, prompts, config, config["temperature"], config["top_p"])[1] for m in models.values()]
    return markdown_table(["prompt", *models], list(zip(*columns, strict=True)))


def reviews_asked(models, tasks, context, config, polarity):
    """([Markdown], figures) of how each checkpoint does the demo's tasks, as far as they fit, beside people."""
    n = config["compare_examples"]
    tasks = {task: [e for e in examples if len(e[0]) < context][:n] for task, examples in tasks.items()}
    rows, decode = compare_tasks(models, tasks, config, polarity), next(iter(models.values())).tokenizer.decode
    people = follows([decode(answer) for _, answer, _ in tasks["write_asked"]], tasks["write_asked"], polarity)
    said = (
        "Of the reviews that people wrote, to the same requests, the judge finds {asked_positive:.1%} of the "
        "positive positive, {asked_negative:.1%} of the negative negative: {asked_mean:.1%}.".format(**people)
    )
    return [format_table(TASK_COLUMNS, rows), said], dict(tasks=rows, written_by_people=people)


def own_columns(row, config, taken=TAKEN):
    """(the name whose interval is shown and drawn, the columns of all) of what one's own judge gave."""
    names = [name.removesuffix("_low") for name in row if name.endswith("_low")]
    names = [name for name in names if name not in taken]
    judge = config["picture_column"] or names[0]
    if judge not in names:
        raise ConfigError(f"picture_column={judge}: the judge gives {', '.join(names)}")
    shares = {name: f"{{{name}:.3f}}" for name in names}
    return judge, shares | {f"95 % interval of {judge}": f"{{{judge}_low:.3f}} to {{{judge}_high:.3f}}"}


def compare(models, data, config, reward_model=None):
    """(Markdown, figures) of {name: Loaded} on held-out prompts and, where sft.pkl asks for reviews, on its tasks.

    The reward model, if any, scores replies; it or the judge of one's own picks the best of n.
    """
    first = next(iter(models))
    for loaded in models.values():
        check_rows(loaded.ckpt, models[first].ckpt)
    if reward_model:
        check_rows(models[first].ckpt, reward_model.ckpt)
    tokenizer = models[first].tokenizer
    readers = [*models.values(), reward_model] if reward_model else models.values()
    context = min(loaded.model.config.max_seq_len for loaded in readers)
    there = [name for name in ("prompts.pkl", "sft.pkl") if (data / name).exists()]
    resume.verify_data(data, resume.hashes_of(data, there))
    _, prompts = load_prompts(data / "prompts.pkl", tokenizer.vocab_size)
    prompts = [prompt for prompt in prompts if len(prompt) < context][: config["compare_prompts"]]
    if not prompts:
        raise DataError(f"{data / 'prompts.pkl'}: no held-out prompt fits a context of {context} tokens")
    tasks = load_tasks(data / "sft.pkl", tokenizer.vocab_size) if (data / "sft.pkl").exists() else {}
    taken = TAKEN | ({"score"} if reward_model else set())
    own = own_judge(config["judge"], prompts, tokenizer, taken) if config["judge"] else None
    # the demo's; of other text SnowNLP, trained on such, can tell nothing
    reviews = bool(tasks.get("write_asked")) and not own
    judge = "positive" if reviews else "score" if reward_model else "bits_per_char"
    if config["picture"] and judge == "bits_per_char" and not own:
        raise ConfigError(f"picture: {data} has no reviews to be judged by polarity; give a reward_model or a judge")
    polarity = snownlp_judge() if reviews else None
    # a reply must fit the first checkpoint too, which says how likely it finds it
    room, asked_for = context - max(map(len, prompts)), config["max_new_tokens"]
    if room < asked_for:
        print(f"replies end after {room} tokens: the longest prompt leaves no more of {context}", file=sys.stderr)
    config = config | dict(max_new_tokens=min(asked_for, room))
    if own:  # what it returns, and picture_column, before much is sampled
        try_judge(models[first], prompts[:2], config, taken)
    rows, n_chars = compare_replies(models, prompts, config, polarity, reward_model, own)
    said = {"positive": "positive by SnowNLP's classifier; ", "score": f"score by {config['reward_model']}; "}
    columns = JUDGED_COLUMNS[judge]
    if own:
        judge, shares = own_columns(rows[0], config, taken)
        said[judge], columns = f"judged by {config['judge']}; ", shares | columns
    parts = [
        f"{len(prompts)} held-out prompts, sampled at temperature {config['compare_temperature']}, top_p "
        f"{config['compare_top_p']}, at most {config['max_new_tokens']} new tokens, seed {config['seed']}; "
        f"{said.get(judge, '')}KL to {first}; distinct-2 in the first {n_chars:,} characters of each.",
        format_table({"checkpoint": "{checkpoint}", "stage": "{stage}"} | columns | REPLY_COLUMNS, rows),
    ]
    if config["best_of"]:
        picks = config["judge"] or reward_model.ckpt.path
        parts.append(
            f"Best of n: of n replies of {first} the one that {picks} scores highest; its KL is the upper bound "
            "ln n - (n - 1) / n."
        )
    in_use = f"temperature {config['temperature']}, top_p {config['top_p']}"
    if shown := prompts[: config["compare_samples"]]:
        parts += [f"Sampled as in use, at {in_use}:", samples_table(models, shown, config)]
    figures = {key: config[key] for key in ("compare_temperature", "compare_top_p", "max_new_tokens", "seed")}
    figures |= {key: config[key] for key in ("best_of", "reward_model") if reward_model or own}
    figures |= dict(prompts=len(prompts), distinct_2_characters=n_chars, judge=judge, replies=rows)
    figures |= dict(judged_by=config["judge"]) if own else {}
    if reviews:
        said, found = reviews_asked(models, tasks, context, config, polarity)
        parts += [f"SFT tasks on validation examples, reviews sampled at {in_use}, polarities told greedily:", *said]
        figures |= found
    return "\n\n".join(parts), figures


def draw_replies(figures, n_checkpoints):
    """PNG of the judge's figure against KL: the checkpoints, and the best of n as the yardstick."""
    rows, judge = figures["replies"], figures["judge"]
    by = figures.get("judged_by") or ("SnowNLP" if judge == "positive" else figures["reward_model"])
    title = f"{figures['prompts']} held-out prompts, temperature {figures['compare_temperature']}, judged by {by}"
    return png(draw(rows[:n_checkpoints], rows[n_checkpoints:], title, judge)[0])


def snownlp_judge():
    """text -> 1 positive, 0 negative, -1 nothing to tell, by SnowNLP's own classifier."""
    try:
        from snownlp import SnowNLP
    except ImportError:
        raise UserError("replies are judged by the package snownlp: pip install snownlp") from None

    def polarity(text):
        try:
            return int(SnowNLP(text).sentiments > 0.5) if text.strip() else -1
        except Exception:  # whatever it makes of text that an untrained model may write
            return -1

    return polarity
