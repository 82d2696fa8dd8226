"""What benchmarks/race.py starts, each in a process of its own: three ways to train by the clock, and the one scorer.

Of each way the real program runs: pretrain.py and sft.py, minimind's two scripts for the same, transformers' Trainer.
Only three of their names are replaced: what makes the model, so that its weights can be kept on the way; the learning
rate, whose schedule ends when the time does; minimind's fixed seed and vocabulary size.

    python benchmarks/racers.py train_ours '{"stage": "pretrain", ...}'
"""

import functools
import importlib
import json
import math
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from harness import flags, hf_config
from torch.nn.utils.rnn import pad_sequence

ENDLESS = 1_000_000  # steps or epochs: the clock ends the run
MARKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the time at which weights are kept
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # minimind trains a fifth of its answers with it, the others without


class Clock:
    """The time of a run. It starts after the first step, and stands while weights are written.

    tick(), called before every step, gives the share of the time that is over and keeps the weights of `model` where a
    mark was passed.
    """

    def __init__(self, seconds, folder):
        self.limit, self.folder, self.model = seconds, Path(folder), None
        self.marks, self.kept, self.ticks = list(MARKS), [], 0

    @property
    def over(self):
        return not self.marks

    def tick(self):
        self.ticks += 1
        if self.ticks <= 2:
            self.start, self.cpu = time.perf_counter(), time.process_time()
        now = time.perf_counter() - self.start
        if self.marks and now >= self.marks[0] * self.limit:
            self.marks = [mark for mark in self.marks if now < mark * self.limit]
            self.cores = (time.process_time() - self.cpu) / now
            torch.save(self.model.state_dict(), self.folder / f"{len(self.kept):02}.pt")
            self.kept.append(now / 60)
            self.start = time.perf_counter() - now
            self.cpu = time.process_time() - self.cores * now
        return min(1.0, now / self.limit)

    def found(self):
        """What race.py keeps of the run; cores: processor time over time, less than the threads on a busy machine."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return dict(minutes=self.kept, steps=self.ticks - 1, parameters=parameters, cores=round(self.cores, 2))


def train_ours(job, clock):
    """pretrain.py or sft.py by the corpus's own config, stopped as a signal stops it: saved, at the end of a step."""
    module = importlib.import_module(job.stage)
    build, rate = module.build_optimizer, module.learning_rate

    def build_optimizer(model, config):
        clock.model = model
        return build(model, config)

    def learning_rate(step, config):
        share, warmup = clock.tick(), config["warmup_steps"]
        if clock.over:
            signal.raise_signal(signal.SIGTERM)
        return rate(step if step < warmup else max(warmup, share * config["max_steps"]), config)

    module.build_optimizer, module.learning_rate = build_optimizer, learning_rate
    keys = dict(data=job.data, out=job.run, seed=job.seed, device="cpu", max_steps=ENDLESS)
    keys |= dict(eval_interval=ENDLESS, save_interval=ENDLESS)
    if job.stage == "pretrain":
        keys |= dict(tokenizer=job.tokenizer, eval_tokens=1024, sample_prompts=[])
    else:
        keys |= dict(init_from=job.start_run, eval_examples=32, eval_prompts=4, eval_new_tokens=1)
    module.main([job.config, *flags(**keys | job.settings)])


def train_minimind(job, clock):
    """minimind's script in job.peer, a copy of its checkout with our vocabulary."""
    os.chdir(Path(job.peer) / "trainer")
    sys.path.insert(0, job.peer)  # before ours, which has a model and a dataset too
    model_minimind = importlib.import_module("model.model_minimind")
    trainer_utils = importlib.import_module("trainer.trainer_utils")
    init, seed, rate = trainer_utils.init_model, trainer_utils.setup_seed, trainer_utils.get_lr

    def init_model(*args, **keys):
        clock.model, tokenizer = init(*args, **keys)
        return clock.model, tokenizer

    def get_lr(step, steps, peak):
        share = clock.tick()
        if clock.over:
            raise SystemExit
        return rate(share, 1, peak)

    trainer_utils.init_model, trainer_utils.get_lr = init_model, get_lr
    trainer_utils.setup_seed = lambda number: seed(number + 1000 * job.seed)
    model_minimind.MiniMindConfig = functools.partial(model_minimind.MiniMindConfig, vocab_size=job.vocab_size)
    if job.start:
        torch.save(torch.load(job.start), f"../out/pretrain_{job.shape['hidden_size']}.pth")
    keys = job.shape | dict(data_path=job.rows, epochs=ENDLESS, save_interval=ENDLESS, num_workers=0, device="cpu")
    script = dict(pretrain="train_pretrain.py", sft="train_full_sft.py")[job.stage]
    sys.argv = [script, *flags(**keys | job.settings)]
    runpy.run_path(script, run_name="__main__")


def train_transformers(job, clock):
    """Trainer with AdamW and a cosine: packed blocks as in transformers' own example, or answers padded a batch."""
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Finish(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = clock.over

    def collate(rows):
        ids, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
        return dict(input_ids=pad_sequence(ids, True), labels=pad_sequence(labels, True, -100))

    def cosine(_):
        share = clock.tick()
        return min(1, share / 0.02) * 0.5 * (1 + math.cos(math.pi * share))

    set_seed(job.seed)
    clock.model = model = LlamaForCausalLM(llama_config(job))
    if job.start:
        model.load_state_dict(torch.load(job.start))
    optimizer = torch.optim.AdamW(
        model.parameters(), job.settings["learning_rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    arguments = TrainingArguments(
        output_dir=job.run,
        per_device_train_batch_size=job.settings["batch_size"],
        max_steps=ENDLESS,
        train_sampling_strategy="random" if job.stage == "pretrain" else "group_by_length",
        seed=job.seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    rows = blocks(job) if job.stage == "pretrain" else answers(job)
    how = dict(data_collator=collate, optimizers=(optimizer, LambdaLR(optimizer, cosine)), callbacks=[Finish()])
    Trainer(model, arguments, train_dataset=rows, **how).train()


def blocks(job):
    """All training text, end to end, in rows of seq_len tokens."""
    from dataset.corpus import Corpus

    corpus = Corpus(job.data, "train")
    rows = corpus.read(0, len(corpus) // job.seq_len * job.seq_len).reshape(-1, job.seq_len)
    return [dict(input_ids=row, labels=row) for row in rows]


def answers(job):
    """The conversations of sft.pkl with labels on the answers alone."""
    from dataset.examples import Examples
    from dataset.formats import load_pkl

    train, _ = Examples(load_pkl(Path(job.data) / "sft.pkl")).split()
    rows = (train[i] for i in range(len(train)))
    return [dict(input_ids=ids, labels=ids * mask - 100 * (1 - mask)) for ids, mask in rows]


def shape_of(job):
    from model import ModelConfig

    return ModelConfig(vocab_size=job.vocab_size, **job.model)


def llama_config(job):
    config = hf_config(shape_of(job))
    config.rms_norm_eps = shape_of(job).norm_eps
    return config


@torch.inference_mode()
def nats(model, rows):
    """-ln of the probability that a module with logits gives the targets of rows, [(context ids, target ids)]."""
    rows, total = sorted(rows, key=lambda row: sum(map(len, row))), 0.0
    for i in range(0, len(rows), 32):
        batch = rows[i : i + 32]
        ids = pad_sequence([torch.tensor([*context, *target]) for context, target in batch], True)
        labels = [torch.tensor([*[-100] * len(context), *target]) for context, target in batch]
        labels = pad_sequence(labels, True, -100)[:, 1:]  # (B, T)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()  # (B, T, V)
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    return total


def prompted(job, heldout):
    """The held-out rows in the racer's formats, [[(context, target)]]: the best of them counts."""
    if job.stage == "pretrain":
        opening = 1 if job.racer == "minimind" else 2  # bos; what parts documents is eos
        return [[([opening], target) for target in heldout["pretrain"]]]
    if job.racer != "minimind":
        return [[(row["prompt"], row["answer"]) for row in heldout["sft"]]]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(job.peer) / "model")
    users = [[dict(role="user", content=row["question"])] for row in heldout["sft"]]
    texts = [tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True) for user in users]
    forms = texts, [text.replace(EMPTY_THOUGHT, "") for text in texts]
    return [
        [(tokenizer(text).input_ids, row["answer"]) for text, row in zip(form, heldout["sft"], strict=True)]
        for form in forms
    ]


def empty_model(job):
    """(a transformers model without its weights, what turns the racer's weights into it)."""
    if job.racer == "minimind":
        sys.path.insert(0, job.peer)
        theirs = importlib.import_module("model.model_minimind")
        return theirs.MiniMindForCausalLM(theirs.MiniMindConfig(vocab_size=job.vocab_size, **job.shape)), dict
    from transformers import LlamaForCausalLM

    from interop.exchange import renamed
    from interop.hf import pairs_to_halves, reorder

    def exported(weights):
        config = shape_of(job)
        return {renamed(name, 1): reorder(name, w, config, pairs_to_halves) for name, w in weights.items()}

    return LlamaForCausalLM(llama_config(job)), exported if job.racer == "ours" else dict


def load(model, weights):
    """Fill a model with all of its weights; an output layer that is the embedding may be named but once."""
    different = model.load_state_dict(weights, strict=False)
    if different.unexpected_keys or set(different.missing_keys) - {"lm_head.weight"}:
        raise SystemExit(f"the weights are not those of the model: {different}")
    model.eval()


def score(job):
    """Bits per character of the held-out rows under the weights of each mark."""
    heldout = json.loads(Path(job.heldout).read_text(encoding="utf-8"))
    model, exported = empty_model(job)
    forms, found = prompted(job, heldout), []
    for path in sorted(Path(job.folder).glob("*.pt")):
        load(model, exported(torch.load(path)))
        best = min(nats(model, rows) for rows in forms)
        found.append(best / math.log(2) / heldout["characters"][job.stage])
    return found


def train(job):
    clock = Clock(job.seconds, job.folder)
    ways = dict(ours=train_ours, minimind=train_minimind, transformers=train_transformers)
    try:
        ways[job.racer](job, clock)
    except SystemExit as ended:
        if not clock.over:
            raise ended
    return clock.found()


if __name__ == "__main__":
    print("\n" + json.dumps(dict(train=train, score=score)[sys.argv[1]](SimpleNamespace(**json.loads(sys.argv[2])))))
