"""Pretraining: predict the next token of packed documents (Llama 2, arXiv:2307.09288, section 2).

Reads data/<name>/{train.*.bin, val.*.bin, meta.json} and a tokenizer; writes a run directory (config.json,
metrics.jsonl, loss.png, samples.txt, ckpt.pt). Where it departs from the paper: one or few epochs of a small corpus,
and Muon as an option for the trunk's matrices.

    python pretrain.py --plan configs/demo/pretrain.py
    python pretrain.py configs/demo/pretrain.py --max_steps=1000
    torchrun --nproc_per_node=2 pretrain.py configs/demo/pretrain.py
"""

import common.early  # noqa: F401 - before what takes seconds to import

import math
from pathlib import Path

from tqdm import tqdm

from common import distributed, plan
from common.checkpoint import check_data
from common.config import ConfigError, parse_config, run
from common.metrics import source_losses
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.stage import Stage
from dataset.batches import move
from dataset.corpus import Corpus, document_numbers
from dataset.formats import load_meta, shortened
from model import Llama, document_starts
from tokenizer import Tokenizer, encode_opening

PANELS = [
    ("loss (nats per token)", ["train/loss", "val/loss"]),
    ("bits per character", ["val/bits_per_char*"]),
    ("learning rate", ["train/learning_rate"]),
    ("gradient norm", ["train/grad_norm"]),
]


def fetch(corpus, n, config, env, eos_id):
    """Micro-batch n of this process, on its way to the device: x, y (B, T), and what masks documents, or None."""
    B, T = config["batch_size"], config["seq_len"]
    x, y = corpus.batch((n * env.world_size + env.rank) * B, B, T, config["seed"])
    if not config["mask_documents"]:
        return *move((x, y), env.device), None
    return move((x, y, document_starts(document_numbers(x, eos_id))), env.device)


def evaluate(model, val, env, max_tokens=None, eos_id=None):
    """Loss on at most max_tokens validation tokens, evenly spaced (None: all of them), in rows of full context.

    Given eos_id, which ends a document, none attends to another. Returns {"val/loss", "val/bits_per_char"} over all
    sources and {"val/bits_per_char/<source>"}.
    """
    total, sources = source_losses(model, val, env, max_tokens, eos_id=eos_id)
    metrics = {f"val/bits_per_char/{name}": loss.bits_per_char for name, loss in sources.items()}
    return {"val/loss": total.per_token, "val/bits_per_char": total.bits_per_char} | metrics


def warn_unless_uniform(loss, vocab_size):
    """A model that knows nothing gives every token the same probability; any other first loss is a bug's."""
    expected = math.log(vocab_size)
    if abs(loss / expected - 1) > 0.02:
        tqdm.write(f"warning: first loss {loss:.3f} is not ln(vocab) = {expected:.3f}")


def openings(tokenizer, config):
    """The ids of the configured prompts; ConfigError for one that leaves the context no room to go on."""
    context, found = config["model"]["max_seq_len"], []
    for text in config["sample_prompts"]:
        found.append(encode_opening(tokenizer, text))
        if (n := len(found[-1])) >= context:
            limit = f"less than model.max_seq_len={context} is needed"
            raise ConfigError(f"sample_prompts: {shortened(text, 60)!r} has {n} tokens: {limit}")
    return found


def continue_prompts(model, tokenizer, prompts, config, env):
    """[(prompt, continuation)] of the configured prompts, the same seed every time."""
    sampling = dict(temperature=0.8, top_p=0.9, seed=config["seed"], dtype=env.generation_dtype)
    replies = model.generate(prompts, config["sample_tokens"], **sampling)
    return [(text, tokenizer.decode(ids)) for text, ids in zip(config["sample_prompts"], replies.tokens, strict=True)]


def announce(train, val, rows_per_step, prompts, context, config):
    """Print what is validated and sampled, and how often each source is read."""
    T, last = config["seq_len"], ", at the end on all" if config["eval_all"] else ""
    n = len(val) if config["eval_all"] and config["keep_best"] else min(config["eval_tokens"], len(val))
    print(f"validation on about {n:,} of {len(val):,} tokens{last}")
    if T < context:
        print(f"rows of {T} tokens are trained, of model.max_seq_len={context} validated")
    if prompts and config["sample_tokens"] >= context:
        print(f"sample_tokens={config['sample_tokens']}: the context of {context} tokens ends them sooner")
    for name, epochs in train.epochs(config["max_steps"] * rows_per_step, T).items():
        print(f"{name}: {epochs:.2f} epochs")


def main(argv=None):
    config = parse_config("pretrain", argv, __doc__)
    if config["plan"]:
        print(plan.report(config))
        return
    stage = Stage("pretrain", config, PANELS)
    if stage.finished:
        return
    env, data = stage.env, Path(config["data"])
    meta, tokenizer = load_meta(data), Tokenizer.load(config["tokenizer"])
    check_data(tokenizer, config["tokenizer"], meta, data / "meta.json")
    train, val = Corpus(data, "train", mixture=config["mixture"]), Corpus(data, "val")
    others = [source for source in val.sources if source not in train.sources]  # of no share in the mixture
    files = [split.file(source) for source in train.sources for split in (train, val)] + [*map(val.file, others)]
    stage.check_data(*(file.name for file in files))

    shape, prompts = plan.shape_of(config, tokenizer.vocab_size), openings(tokenizer, config)
    plan.check_fits(shape, config, env)
    model = Llama(shape).to(env.device)
    model.recompute = config["recompute"]
    distributed.compiled(model, env, config, dynamic=None)  # its rows are all of one length
    forward = distributed.wrap(model, env, config)
    optimizer = build_optimizer(model, config)
    stage.start(model, optimizer, tokenizer)
    already_seen = stage.tokens_seen
    T, accumulation = config["seq_len"], config["grad_accumulation_steps"]
    rows_per_step = config["batch_size"] * accumulation * env.world_size
    if env.is_main:
        print(f"{model.num_params():,} parameters; {T * rows_per_step:,} tokens a step")
        announce(train, val, rows_per_step, prompts, shape.max_seq_len, config)

    eos_id = tokenizer.eos_id
    x, y, documents = fetch(train, stage.first * accumulation, config, env, eos_id)
    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                shown = None if stage.validates_on_all(step) else config["eval_tokens"]
                metrics = evaluate(stage.whole, val, env, shown, eos_id if config["mask_documents"] else None)
                stage.report(step, metrics, continue_prompts(stage.whole, tokenizer, prompts, config, env))
                if step == 0:
                    warn_unless_uniform(metrics["val/loss"], tokenizer.vocab_size)
            if stage.due(step, "save_interval"):
                stage.save(step)
            if stage.ends(step):
                break

            losses = []
            for micro in range(accumulation):
                distributed.sync(forward, last=micro == accumulation - 1)
                with env.autocast():  # each row counts T targets: the mean of means is exact
                    micro_loss = forward(x, y, documents=documents) / accumulation
                micro_loss.backward()
                losses.append(micro_loss.detach())
                # while an accelerator still computes
                x, y, documents = fetch(train, step * accumulation + micro + 1, config, env, eos_id)
            loss = distributed.mean(sum(part.item() for part in losses), env)
            grad_norm = stage.clip_and_step(step, loss)
            metrics = {"train/loss": loss, "train/learning_rate": lr, "train/grad_norm": grad_norm}
            stage.log(step + 1, T * rows_per_step, metrics)
    if env.is_main and stage.loop_seconds:
        rate = (stage.tokens_seen - already_seen) / stage.loop_seconds / env.world_size
        print(plan.utilisation(rate * plan.flops_per_token(model.config, T), env))
    stage.close()


if __name__ == "__main__":
    run(main)
