"""Quantize a checkpoint to int8: a quarter of the size, and faster decoding on a CPU.

Every linear layer and the token embedding (stored once; with tied weights it is the output projection too) becomes
int8 with one scale per output channel, rounded to nearest. Departs from LLM.int8() (arXiv:2208.07339): weights only,
and no float16 columns for outliers, which it finds to matter from 6.7 billion parameters on. Norms stay float32.

    python quantize.py --init_from=out/demo/sft --data=data/demo --out=out/demo/quantize

in:  init_from/ckpt.pt of any stage, data/val.bin
out: out/{ckpt.pt, config.json, metrics.jsonl, samples.txt}
"""

from dataclasses import replace
from pathlib import Path

import torch

from common import checkpoint
from common.checkpoint import CheckpointError
from common.config import ConfigError, parse_config, run, save_config
from common.distributed import cleanup, setup
from common.metrics import MetricLog, source_losses
from dataset import TokenBin
from tokenizer import encode_opening, encode_prompt


def quantize_int8(weight):
    """weight (N, K) -> q (N, K) int8, scale (N,) bfloat16, with |weight - scale * q| <= scale / 2.

    The scale takes the largest of a row to +-127; it is rounded to bfloat16 first, so that q makes up for that.
    """
    scale = (weight.abs().amax(1) / 127).to(torch.bfloat16)
    scale = torch.where(scale == 0, 1, scale)  # a row of zeros
    q = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def quantize_weights(weights):
    """Weights by name with every matrix `x.weight` replaced by `x.q` and `x.scale`, the names of common/lowbit.py."""
    quantized = {}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckpointError(f"{name} holds values that are not finite")
        if weight.dim() == 2:
            layer = name.removesuffix("weight")
            quantized[f"{layer}q"], quantized[f"{layer}scale"] = quantize_int8(weight)
        else:
            quantized[name] = weight
    return quantized


def quantize_checkpoint(ckpt):
    """The same checkpoint in int8, not yet written."""
    checkpoint.refuse_quantized(ckpt)
    try:
        return replace(ckpt, weights=quantize_weights(ckpt.weights), quant={"method": "int8"})
    except CheckpointError as error:
        raise CheckpointError(f"{ckpt.path} cannot be quantized: {error}") from None


def open_val(data_dir, ckpt, tok):
    """val.bin of a data directory that was made with the checkpoint's tokenizer."""
    tokens = TokenBin(Path(data_dir) / "val.bin")
    checkpoint.check_data(tok, ckpt.path, tokens.meta, Path(data_dir) / "meta.json")
    if len(tokens) < 2:
        raise ConfigError(f"{tokens.path}: {len(tokens)} tokens are too few to measure on")
    return tokens


@torch.no_grad()
def score_drift(model, other, x, batch_size, env):
    """Of scalar heads: (root mean square of the scores' difference, standard deviation of `model`'s scores)."""
    with env.autocast():
        scores = [
            torch.cat([m.values(rows.to(env.device)).cpu() for rows in x.split(batch_size)]) for m in (model, other)
        ]
    return (scores[0] - scores[1]).square().mean().sqrt().item(), scores[0].std().item()


def evaluate(model, int8_model, val, config, env):
    """What quantization changed on val, a TokenBin, as metrics."""
    max_tokens, batch_size = config["eval_tokens"] or len(val), config["eval_batch_size"]
    if model.config.scalar_head:
        T = min(model.config.max_seq_len, len(val))
        x, _ = val.batch(0, max(1, min(max_tokens, len(val)) // T), T, seed=0)
        drift, std = score_drift(model, int8_model, x, batch_size, env)
        return {"quantize/score_rms_difference": drift, "quantize/score_std": std}
    losses = (source_losses(m, val, env, max_tokens, batch_size)[0] for m in (model, int8_model))
    before, after = (loss.perplexity for loss in losses)
    return {
        "quantize/perplexity_float32": before,
        "quantize/perplexity_int8": after,
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
    replies = model.generate(ids, max_new_tokens, temperature=0, eos_id=stop_id).tokens
    return [(f"[{label}] {prompt}", tok.decode(reply)) for prompt, reply in zip(prompts, replies, strict=True)]


def main(argv=None):
    config = parse_config("quantize", argv, __doc__)
    if config["method"] != "int8":
        raise ConfigError(f"method={config['method']}: only int8 is known")
    if config["eval_tokens"] < 0 or config["eval_batch_size"] < 1 or config["sample_tokens"] < 1:
        raise ConfigError("eval_tokens must be 0 or more, eval_batch_size and sample_tokens 1 or more")
    env, out = setup(config["device"], config["dtype"]), Path(config["out"])
    ckpt = checkpoint.load(config["init_from"])
    if ckpt.path.resolve() == (out / checkpoint.FILE_NAME).resolve():
        raise ConfigError(f"out={out} is the run of init_from: its checkpoint would be replaced")
    int8_ckpt = quantize_checkpoint(ckpt)
    tok = checkpoint.tokenizer_of(ckpt)
    val = open_val(config["data"], ckpt, tok)
    if checkpoint.begin(config, "quantize"):
        print(f"{out} is complete: nothing to do")
        return
    save_config(config, out)
    log = MetricLog(out)

    model = checkpoint.build_model(ckpt).to(env.device).eval()
    int8_model = checkpoint.build_model(int8_ckpt).to(env.device).eval()
    metrics = evaluate(model, int8_model, val, config, env)
    if config["sample_prompts"] and not model.config.scalar_head:
        for m, label in ((model, "float32"), (int8_model, "int8")):
            prompts = config["sample_prompts"], config["sample_tokens"]
            pairs = sample_pairs(m, label, tok, checkpoint.continues(ckpt), *prompts)
            log.samples(ckpt.step, pairs)

    checkpoint.save(
        out,
        stage="quantize",
        step=ckpt.step,
        tokens_seen=ckpt.tokens_seen,
        model=int8_model,
        tokenizer=ckpt.tokenizer,
        document_ids=ckpt.document_ids,
        config=config,
        parent=checkpoint.parent_of(ckpt),
        quant=int8_ckpt.quant,
    )
    metrics |= file_sizes(ckpt, checkpoint.find(out))
    log.write(ckpt.step, metrics)
    for name, value in metrics.items():
        print(f"{name.removeprefix('quantize/')}: {value:{',.6g' if isinstance(value, float) else ','}}")
    cleanup(env)


def file_sizes(ckpt, int8_file):
    """Bytes of the float32 weights, of the written file (tokenizer and all) and of the tokenizer in it."""
    float32 = 4 * sum(weight.numel() for weight in ckpt.weights.values())
    written = int8_file.stat().st_size
    return {
        "quantize/float32_weight_bytes": float32,
        "quantize/file_bytes": written,
        "quantize/tokenizer_bytes": len(ckpt.tokenizer),
        "quantize/file_ratio": written / float32,
    }


if __name__ == "__main__":
    run(main)
