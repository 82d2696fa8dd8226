"""Runs of random models to export, and what export.py and transformers make of them."""

import io
from pathlib import Path

import sentencepiece
import torch
import transformers

import export
from common import checkpoint
from model import Llama, ModelConfig
from tokenizer import Tokenizer

TEXT = "这本书很好看，我很喜欢。酒店的房间很干净，服务也不错。差评好评写一条 the quick brown fox 12345"
SHAPES = [dict(), dict(n_kv_heads=2), dict(tied=False), dict(n_kv_heads=1, tied=False)]
SHAPE_NAMES = ["tied MHA", "tied GQA", "untied MHA", "untied MQA"]
QUESTION = [dict(role="user", content="写一条酒店好评。")]


def train(**changes):
    model, options = io.BytesIO(), dict(normalization_rule_name="identity", add_dummy_prefix=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, remove_extra_whitespaces=False, **options | changes,
    )  # fmt: skip
    return Tokenizer(model.getvalue())


def make(directory, tok, stage="sft", seed=0, **changes):
    """A run directory with a random model whose next tokens are far from equally likely."""
    torch.manual_seed(seed)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=tok.vocab_size, max_seq_len=256)
    model = Llama(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() == 2 else p.uniform_(0.5, 1.5)
        model.head_weight[3:259] = 0  # no bytes in greedy text: transformers decodes half a character otherwise
    directory.mkdir(parents=True)
    facts = dict(stage=stage, step=7, tokens_seen=70, tokenizer=tok.model_bytes, config=dict(data="data/none"))
    checkpoint.save(directory, model=model, **facts)
    return directory


def ours(directory):
    return checkpoint.build_model(checkpoint.load(directory)).eval()


def run(**options):
    export.main([f"--{key}={value}" for key, value in options.items()])
    return Path(options["out"])


def theirs(folder, kind=transformers.AutoModelForCausalLM):
    return kind.from_pretrained(folder, dtype="auto").eval()
