"""What every foreign format needs: the names of tensors, the ids around a text, a Checkpoint of what was read."""

import json
from dataclasses import asdict

import torch

from common import checkpoint
from common.checkpoint import Checkpoint
from common.config import UserError
from common.ranges import LARGEST
from configs.eval_generate import config as chat_defaults
from model import Llama

FACTS = "tiny_llama2_zh.provenance"  # our key in the metadata of safetensors and GGUF
HISTORY = dict(stage=str, step=int, tokens_seen=int, config=dict, parent=dict | None, git_commit=str | None)
SAMPLING = {key: chat_defaults[key] for key in ("temperature", "top_k", "top_p")}
# our names of tensors, Hugging Face's, GGUF's; those of a layer in the order of a llama2.c file
NAMES = [
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    ("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
    ("scalar", "score", None),
]


def text_ids(ckpt, tok):
    """What bos and eos mean outside: a base model's document, or the two marks of our conversations."""
    return (tok.opening_id, tok.closing_id) if checkpoint.continues(ckpt) else (tok.bos_id, tok.eos_id)


def renamed(name, column):
    """A tensor's name in Hugging Face (column 1) or GGUF (2): layers.3.attention.wq.weight -> blk.3.attn_q.weight."""
    layer = name.split(".")[1]
    for names in NAMES:
        if name == names[0].format(layer) + ".weight":
            return names[column].format(layer) + ".weight"
    raise KeyError(name)


def shapes_of(config):
    """{name: shape} of the model's weights, without making them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Llama(config).state_dict().items()}


def imported(path, config, weights, tok, document_ids, facts):
    """A Checkpoint of what was read from `path`; `facts` are ours if it carried them, else it is a pretrained model."""
    if config.vocab_size < tok.n_pieces:
        raise UserError(f"{path}: vocab_size is {config.vocab_size}, its tokenizer has {tok.n_pieces} pieces")
    history = dict(stage="pretrain", step=0, tokens_seen=0, config={}, parent=None, git_commit=None)
    history |= {key: facts[key] for key in HISTORY if key in facts}
    contents = dict(model_config=asdict(config), weights=weights, tokenizer=tok.model_bytes)
    return Checkpoint(path, **history, **contents, document_ids=list(document_ids), quant=None, training=None)


def read_facts(path, text, vocab_size):
    """Our facts that travelled with a model, {} of one that is not ours; UserError if they are not what was written."""
    try:
        facts = json.loads(text)
        right = all(isinstance(facts[key], kind) for key, kind in HISTORY.items() if key in facts)
        ids = facts.get("document_ids", [0, 0])
        right &= len(ids) == 2 and all(type(i) is int and 0 <= i < vocab_size for i in ids)
        right &= 0 <= facts.get("step", 0) <= LARGEST and 0 <= facts.get("tokens_seen", 0) <= 10**18
        parent = facts.get("parent")
        right &= parent is None or all(isinstance(parent.get(key), str) for key in ("path", "stage", "sha256"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise UserError(f"{path}: its metadata {FACTS} was changed or damaged: take it out, or export the model again")
    return facts


def check_finite(path, tensors):
    """Refuse what is not a number by the name of its tensor."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}, only float weights are imported")
        if not tensor.float().isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite")


def check_weights(ckpt, dtype):
    """Refuse what the type cannot hold; the scales of q8_0 and q4_0 are float16."""
    kind = dict(bfloat16=torch.bfloat16, float16=torch.float16, q8_0=torch.float16, q4_0=torch.float16)
    largest = torch.finfo(kind.get(dtype, torch.float32)).max
    for name, weight in ckpt.weights.items():
        if not (most := weight.abs().max()) <= largest:  # nor is NaN
            raise UserError(f"{ckpt.path}: {name} holds {most:g}, {dtype} ends at {largest:g}")
