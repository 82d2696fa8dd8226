"""Quantize a checkpoint to a quarter of the size (int8) or less (int4 layers: an eighth); it decodes faster on a CPU.

Every linear layer and the token embedding (stored once; with tied weights it is the output projection too) is kept in
few bits, norms in float32. method=int8: one scale per output channel, rounded to nearest. Departs from LLM.int8()
(arXiv:2208.07339): weights only, and no float16 columns for outliers, which it finds to matter from 6.7 billion
parameters on. method=int4: groups of columns with a scale and a zero, either rounded to nearest or by GPTQ
(arXiv:2210.17323), which lets the weights not yet rounded make up for the errors of those that are, as measured on
calibration text. Departs from it: the range of a group is chosen for the least error, and no column is set to zero.

    python quantize.py --init_from=out/demo/sft --data=data/demo --out=out/demo/quantize
    python quantize.py --init_from=out/demo/sft --data=data/demo --out=out/demo/int4 --method=int4

in:  init_from/ckpt.pt of any stage, data/val.*.bin; for GPTQ data/train.*.bin or data/sft.pkl
out: out/{ckpt.pt, config.json, metrics.jsonl, samples.txt}
"""

import common.early  # noqa: F401 - before what takes seconds to import

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, resume
from common.checkpoint import CheckpointError
from common.config import ConfigError, parse_config, run
from common.distributed import cleanup, setup
from common.files import save_config, unlock
from common.metrics import MetricLog, source_losses
from dataset.batches import pad_batch
from dataset.corpus import Corpus
from dataset.examples import Examples
from dataset.formats import load_pkl
from lowbit.gptq import gptq, quantize_int4
from lowbit.layers import bits_of, pack_nibbles
from tokenizer import encode_opening, encode_prompt

INT8 = {"method": "int8"}
# Layers of a block that see the same input, in the order in which the block computes them.
SAME_INPUT = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)


def spec_of(config):
    """The quantization spec that a config asks for."""
    if config["method"] == "int8":
        return INT8
    keys = ("method", "group_size", "symmetric", "algorithm")
    return {key: config[key] for key in keys} | {"int8": config["int8_layers"]}


def check_patterns(ckpt, quant):
    """Refuse a pattern for int8 layers that names none, but for those that other models have."""
    layers = {name.removesuffix(".weight") for name, weight in ckpt.weights.items() if weight.dim() == 2}
    for pattern in quant.get("int8", []):
        if not any(fnmatchcase(name, pattern) for name in layers | {"output", "scalar"}):
            raise ConfigError(f"int8_layers: {pattern} matches no layer of {ckpt.path}, such as {max(layers)}")


# one weight


def quantize_int8(weight):
    """weight (N, K) -> q (N, K) int8, scale (N,) bfloat16, with |weight - scale * q| <= scale / 2.

    The scale takes the largest of a row to +-127; it is rounded to bfloat16 first, so that q makes up for that.
    """
    scale = (weight.abs().amax(1) / 127).to(torch.bfloat16)
    scale = torch.where(scale == 0, 1, scale)  # a row of zeros
    q = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def as_buffers(q, scale, zero, symmetric):
    """What quantize_int4 and gptq return, as an int4 layer of lowbit/layers.py keeps it."""
    return {"q": pack_nibbles(q), "scale": scale} | ({} if symmetric else {"zero": zero})


# a model


def quantize_weights(weights, quant):
    """Weights by name with every matrix `x.weight` rounded to nearest, replaced by the buffers of lowbit/layers.py."""
    quantized = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if weight.dim() == 1:
            buffers = {"weight": weight}
        elif bits_of(layer, quant) == 8:
            buffers = dict(zip(("q", "scale"), quantize_int8(weight), strict=True))
        else:
            symmetric = quant["symmetric"]
            buffers = as_buffers(*quantize_int4(weight, quant["group_size"], symmetric), symmetric)
        quantized |= {f"{layer}.{key}": tensor for key, tensor in buffers.items()}
    return quantized


def quantize_checkpoint(ckpt, quant=INT8):
    """The same checkpoint rounded to nearest, not yet written. For GPTQ it is where `calibrate` starts from."""
    checkpoint.refuse_quantized(ckpt)
    return replace(ckpt, weights=quantize_weights(ckpt.weights, quant), quant=quant)


def layer_inputs(layer, compute, batches):
    """What comes into `layer` when `compute` takes the states h (B, T, D) of [(h, real (B, T)), ...]: yields (n, K)."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for h, real in batches:
            compute(h)
            yield seen.pop()[real].float()
    finally:
        hook.remove()


def input_hessian(inputs):
    """2 X X^T / n (K, K) of inputs, an iterable of (n, K)."""
    total, n = 0.0, 0
    for x in inputs:
        total, n = total + 2 * x.T @ x, n + len(x)
    return total / n


def refit(model, names, weights, hessian, quant, options):
    """Replace the int4 weights of the layers `names`, of one input, by GPTQ's; prints what is lost of their output."""
    for name in names:
        weight, layer = weights[f"{name}.weight"].to(hessian.device), model.get_submodule(name)
        try:
            result = gptq(weight, hessian, quant["group_size"], quant["symmetric"], **options)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be quantized: {error}") from None
        lost = [output_error(weight, layer.weight, hessian)]
        layer.load_state_dict(as_buffers(*result, quant["symmetric"]))
        lost.append(output_error(weight, layer.weight, hessian))
        print(f"{name}: relative error of its output {lost[1]:.4f} (rounded to nearest {lost[0]:.4f})", flush=True)


def output_error(weight, quantized, hessian):
    """||(weight - quantized) X|| / ||weight X|| with X X^T ~ hessian."""
    squares = [((w @ hessian) * w).sum().clamp(min=0) for w in (weight - quantized, weight)]
    return (squares[0] / squares[1].clamp(min=1e-30)).sqrt().item()


@torch.no_grad()
def calibrate(model, weights, batches, quant, **options):
    """Replace the int4 weights of `model`, rounded to nearest, by GPTQ's, in place.

    weights: float32 by name. batches: [(ids (B, T), real (B, T) bool), ...], their padding marked. options: of gptq.
    Layer by layer: each is fitted to the inputs that the quantized layers before it make of the calibration text.
    """
    device = model.norm.weight.device
    batches = [(model.tok_embeddings(ids.to(device)), real.to(device)) for ids, real in batches]
    for i, block in enumerate(model.layers):

        def forward(h, block=block):
            return block(h, model.rope_cos[: h.size(1)], model.rope_sin[: h.size(1)])

        for group in SAME_INPUT:
            names = [f"layers.{i}.{name}" for name in group]
            names = [name for name in names if bits_of(name, quant) == 4]
            if names:
                inputs = layer_inputs(model.get_submodule(names[0]), forward, batches)
                refit(model, names, weights, input_hessian(inputs), quant, options)
        batches = [(forward(h), real) for h, real in batches]
    for name in ("output", "scalar"):  # of the two a model has at most one
        if getattr(model, name) is not None and bits_of(name, quant) == 4:
            hessian = input_hessian(model.norm(h)[real] for h, real in batches)
            refit(model, [name], weights, hessian, quant, options)


# data


def open_val(data_dir, ckpt, tok):
    """The validation text of a data directory that was made with the checkpoint's tokenizer."""
    corpus = Corpus(data_dir, "val")
    checkpoint.check_data(tok, ckpt.path, corpus.meta, Path(data_dir) / "meta.json")
    if len(corpus) < 2:
        raise ConfigError(f"{corpus.path}: {len(corpus)} tokens are too few to measure on")
    return corpus


def calibration_batches(data_dir, calibration, n_tokens, max_len, batch_size, vocab_size):
    """About n_tokens of the training text or of sft.pkl's training examples, evenly spaced, as batches for calibrate.

    Made with the checkpoint's tokenizer if the validation text is: one meta.json describes both.
    """
    if calibration == "train":
        source = Corpus(data_dir, "train", vocab_size)
        path, available, n_rows = source.path, len(source), -(-n_tokens // max_len)
    else:
        path = Path(data_dir) / calibration
        source, _ = Examples(load_pkl(path), vocab_size=vocab_size, path=path, max_len=max_len).split(False)
        available = int(source.lengths.sum())
        n_rows = -(-n_tokens * len(source) // max(available, 1))
    if available <= max(n_tokens, max_len):
        raise ConfigError(f"{path}: {available} tokens are too few for calibration_tokens={n_tokens}")
    if calibration == "train":
        starts = np.linspace(0, available - max_len - 1, n_rows, dtype=np.int64).tolist()
        rows = [source.windows(start, start + max_len + 1, max_len)[0][0] for start in starts]
    else:
        chosen = np.linspace(0, len(source) - 1, n_rows, dtype=np.int64).tolist()
        rows = sorted((source[i][0] for i in chosen), key=len)  # of similar length in a batch
    batches = []
    for first in range(0, n_rows, batch_size):
        batch = pad_batch([(ids, ids) for ids in rows[first : first + batch_size]])
        batches.append((batch["ids"], torch.arange(batch["ids"].size(1)) < batch["lengths"][:, None]))
    return batches


# what it changed


@torch.no_grad()
def score_drift(model, other, x, batch_size, env):
    """Of scalar heads: (root mean square of the scores' difference, standard deviation of `model`'s scores)."""
    scores = [torch.cat([m.values(rows.to(env.device)).cpu() for rows in x.split(batch_size)]) for m in (model, other)]
    return (scores[0] - scores[1]).square().mean().sqrt().item(), scores[0].std().item()


def evaluate(model, low_model, val, config, env, eos_id=None):
    """What quantization changed on val, a Corpus, as metrics; given eos_id, no document attends to those before it."""
    max_tokens, batch_size = config["eval_tokens"] or len(val), config["eval_batch_size"]
    if model.config.scalar_head:
        T = min(model.config.max_seq_len, len(val))
        x, _ = val.batch(0, max(1, min(max_tokens, len(val)) // T), T, seed=0)
        drift, std = score_drift(model, low_model, x, batch_size, env)
        return {"quantize/score_rms_difference": drift, "quantize/score_std": std}
    losses = (source_losses(m, val, env, max_tokens, batch_size, eos_id)[0] for m in (model, low_model))
    before, after = (loss.perplexity for loss in losses)
    return {
        "quantize/perplexity_float32": before,
        "quantize/perplexity_quantized": after,
        "quantize/perplexity_ratio": after / before,
    }


def sample_pairs(model, label, tok, continues, prompts, max_new_tokens):
    """[(labelled prompt, greedy reply), ...]; a pretrained model continues the text, later ones are asked."""
    room = model.config.max_seq_len - 1
    stop_id = tok.closing_id if continues else tok.eos_id
    if continues:
        ids = [encode_opening(tok, prompt)[:room] for prompt in prompts]
    else:
        ids = [encode_prompt(tok, [{"role": "user", "content": prompt}], room) for prompt in prompts]
    # weights as they are on a GPU too, where bfloat16 would hide what is compared
    replies = model.generate(ids, max_new_tokens, temperature=0, eos_id=stop_id, dtype=model.norm.weight.dtype).tokens
    return [(f"[{label}] {prompt}", tok.decode(reply)) for prompt, reply in zip(prompts, replies, strict=True)]


def file_sizes(ckpt, file):
    """Bytes of the float32 weights, of the written file (tokenizer and all) and of the tokenizer in it."""
    float32 = 4 * sum(weight.numel() for weight in ckpt.weights.values())
    written = file.stat().st_size
    return {
        "quantize/float32_weight_bytes": float32,
        "quantize/file_bytes": written,
        "quantize/tokenizer_bytes": len(ckpt.tokenizer),
        "quantize/file_ratio": written / float32,
    }


def check_data(data, val, calibration, verify):
    """{name: sha256} of the files that are read, of those of the calibration too if it is given."""
    files = [val.file(source).name for source in val.sources]
    if calibration:
        text = calibration == "train"
        files += [f"train.{source}.bin" for source in val.meta["sources"]] if text else [calibration]
    hashes = resume.hashes_of(data, files)
    if verify:
        resume.verify_data(data, hashes)
    else:
        print(f"verify_data=False: the files in {data} are taken to be what meta.json says")
    return hashes


def main(argv=None):
    config = parse_config("quantize", argv, __doc__)
    quant = spec_of(config)
    env, out, data = setup(config["device"], "float32"), Path(config["out"]), Path(config["data"])
    resume.keep_apart(config)
    ckpt = checkpoint.load(config["init_from"], training=False)
    low_ckpt = quantize_checkpoint(ckpt, quant)
    check_patterns(ckpt, quant)
    tok = checkpoint.tokenizer_of(ckpt)
    val = open_val(data, ckpt, tok)
    model = checkpoint.build_model(ckpt)
    calibrated = quant.get("algorithm") == "gptq"
    hashes = check_data(data, val, config["calibration"] if calibrated else None, config["verify_data"])
    if calibrated:
        sizes = config["calibration_tokens"], model.config.max_seq_len, config["eval_batch_size"]
        batches = calibration_batches(data, config["calibration"], *sizes, tok.vocab_size)
    if config["sample_prompts"] and model.config.max_seq_len < 2:
        raise ConfigError(
            f"sample_prompts: a context of {model.config.max_seq_len} token has no room; --sample_prompts="
        )
    if done := resume.begin(config, "quantize"):
        resume.still_finished(done, config)
        print(f"{out} is complete: nothing to do")
        return
    new = resume.make_new(out)  # takes the place of what is in `out` once all is measured
    save_config(config, new)
    log = MetricLog(new)

    model = model.to(env.device).eval()
    low_model = checkpoint.build_model(low_ckpt).to(env.device).eval()
    if calibrated:
        options = dict(damping=config["damping"], act_order=config["act_order"], search=config["range_search"])
        calibrate(low_model, ckpt.weights, batches, quant, **options)
    masked = tok.eos_id if checkpoint.masks_documents(ckpt) else None
    metrics = evaluate(model, low_model, val, config, env, masked)
    for name in ("quantize/perplexity_float32", "quantize/score_rms_difference"):
        if not math.isfinite(found := metrics.get(name, 0)):
            raise CheckpointError(f"{ckpt.path}: {name} is {found}: weights are too large, or training diverged")
    if config["sample_prompts"] and not model.config.scalar_head:
        if config["sample_tokens"] >= (context := model.config.max_seq_len):
            print(f"sample_tokens={config['sample_tokens']}: the context of {context} tokens ends a reply sooner")
        asked = tok, checkpoint.continues(ckpt), config["sample_prompts"], config["sample_tokens"]
        for m, label in ((model, "float32"), (low_model, quant["method"])):
            with checkpoint.naming(ckpt):
                log.samples(ckpt.step, sample_pairs(m, label, *asked))

    checkpoint.save(
        new,
        stage="quantize",
        step=ckpt.step,
        tokens_seen=ckpt.tokens_seen,
        model=low_model,
        tokenizer=ckpt.tokenizer,
        document_ids=ckpt.document_ids,
        config=config,
        parent=checkpoint.parent_of(ckpt),
        quant=quant,
        data=hashes,
    )
    metrics |= file_sizes(ckpt, checkpoint.find(new))
    log.write(ckpt.step, metrics)
    resume.commit(out)
    unlock(out)
    for name, value in metrics.items():
        print(f"{name.removeprefix('quantize/')}: {value:{',.6g' if isinstance(value, float) else ','}}")
    cleanup(env)


if __name__ == "__main__":
    run(main)
