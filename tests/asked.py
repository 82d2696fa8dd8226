"""Models that say what a test wants, data to ask them about, and one run of eval_generate.py."""

import io
import math

import numpy as np
import sentencepiece
import torch
from packing import pack, pack_examples

import eval_generate
from common import checkpoint
from dataset.formats import BinWriter, save_meta, save_pkl, token_dtype
from model import Llama, ModelConfig
from tokenizer import Tokenizer, encode_example, encode_prompt

TEXT = "这本书很好看，我很喜欢。酒店的房间很干净，服务也不错。差评好评写一条"
LONG = "龘" * 40  # not in the vocabulary: 120 byte tokens
VOCAB, GAP = 320, 20.0  # GAP: how far a chain's next token is above the others, in nats


def user(text):
    return [dict(role="user", content=text)]


def make_tokenizer(text):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20), model_writer=model, vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, add_dummy_prefix=False, hard_vocab_limit=False,
        normalization_rule_name="identity",
    )  # fmt: skip
    return Tokenizer(model.getvalue())


def random_model(vocab_size, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=vocab_size, max_seq_len=64)
    model = Llama(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.2)
    return model


@torch.no_grad()
def chain_model(vocab_size, ids, max_seq_len=64):
    """A model whose token after ids[i] is ids[i + 1], by GAP nats over any other; after the rest all are alike."""
    dim = 2 * -(-vocab_size // 2)
    shape = dict(dim=dim, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=32, tied=False, norm_eps=1e-12)
    model = Llama(ModelConfig(**shape, vocab_size=vocab_size, max_seq_len=max_seq_len)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.zero_()
    model.tok_embeddings.weight.fill_diagonal_(1)  # normalised: sqrt(dim) at the token's own place
    assert len(set(ids[:-1])) == len(ids) - 1
    for now, after in zip(ids, ids[1:], strict=False):
        model.output.weight[after, now] = GAP / math.sqrt(dim)
    return model


def says(tok, text, **changes):
    """A model that answers `text` to every question."""
    return chain_model(tok.vocab_size, [tok.bos_id, *tok.encode(text), tok.eos_id], **changes)


def save(directory, tok, model, stage="sft", **more):
    directory.mkdir(parents=True)
    checkpoint.save(
        directory, stage=stage, step=1, tokens_seen=9, model=model, tokenizer=tok.model_bytes, config={}, **more
    )
    return directory


def run(capsys, *argv):
    """Standard output and error of one run."""
    capsys.readouterr()
    eval_generate.main([*map(str, argv), "--device=cpu"])
    return capsys.readouterr()


def save_data(directory, tok, sources, prompts=(), examples=()):
    """A data directory: validation text {source: text}, prompts (text, is_val), examples (task, question, answer,
    label, is_val)."""
    directory.mkdir()
    meta = dict(format_version=2, vocab_size=tok.vocab_size, tokenizer_sha256=tok.sha256, files={}, sources={})
    meta |= dict(dtype=token_dtype(tok.vocab_size).name)
    for name, text in sources.items():
        with BinWriter(directory / f"val.{name}.bin", tok.vocab_size) as file:
            file.write([*tok.encode(text), tok.eos_id])
        counts = dict(documents=1, tokens=file.tokens, characters=len(text))
        meta["sources"][name] = dict(train=counts, val=counts)
        meta["files"][file.path.name] = dict(part="pretrain", tokens=file.tokens)
    save_meta(directory, meta)
    if prompts:
        ids = [encode_prompt(tok, user(text)) for text, _ in prompts]
        tokens, offsets = pack(ids, token_dtype(tok.vocab_size))
        is_val = np.array([is_val for _, is_val in prompts])
        save_pkl(directory / "prompts.pkl", dict(tokens=tokens, offsets=offsets, is_val=is_val))
    if examples:
        tasks, questions, answers, labels, is_val = zip(*examples, strict=True)
        made = [
            encode_example(tok, [*user(question), dict(role="assistant", content=reply)])[0]
            for question, reply in zip(questions, answers, strict=True)
        ]
        names = ["write_asked", "polarity", "write"]
        arrays = pack_examples(made, tok.vocab_size) | dict(task_names=names, is_val=np.array(is_val))
        task = np.array([names.index(name) for name in tasks], dtype=np.uint8)
        save_pkl(directory / "sft.pkl", arrays | dict(task=task, label=np.array(labels, dtype=np.int8)))
    return directory
