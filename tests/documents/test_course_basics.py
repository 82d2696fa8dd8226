"""The numbers that the course works out by hand, from the functions that the stages call: they stand in its pages."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from packing import make_bins
from tiny import float64
from torch import nn

import sft
from common.metrics import TextLoss
from common.optim import Muon, build_optimizer, learning_rate
from configs.demo.pretrain import config as demo
from configs.pretrain import config as pretrain_config
from configs.sizes import count_parameters
from configs.tokenizer import config as tokenizer_config
from corpora.clean import content_key, is_validation, text_hash
from corpora.dedup import near_duplicates, signature
from dataset.corpus import Corpus, document_numbers
from docs.links import ROOT
from head import LinearCrossEntropy
from model import Attention, ModelConfig, RMSNorm, Rope, SwiGLU, rope_table
from tokenizer import Tokenizer, encode_example, encode_prompt
from tokenizer.train import Corpus as TrainingText
from tokenizer.train import characters_per_token, train_bpe

LINES = ["房间很好", "房间很小", "早餐很好"]


def says(page, *expected):
    text = (ROOT / "docs" / "course" / f"{page}.md").read_text(encoding="utf-8")
    assert [each for each in expected if each not in text] == []


def numbers(values, digits=4):
    return ", ".join(f"{value:.{digits}f}" for value in values)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    file = tmp_path_factory.mktemp("course") / "text.txt"
    file.write_text("\n".join(LINES), encoding="utf-8")
    config = tokenizer_config | dict(vocab_size=363, character_coverage=1.0)
    return Tokenizer(train_bpe(TrainingText([str(file)], 16384), config))


def test_tokenizer(tok):
    pieces = [tok.bytes_of(i).decode() for i in range(259, tok.vocab_size)]
    assert pieces[:2] == ["很好", "房间"] and {"很", "小", "餐"} < set(pieces)
    question, answer = dict(role="user", content="房间很小"), dict(role="assistant", content="很好")
    example, _ = encode_example(tok, [question, answer])
    row = " | ".join
    says("tokenizer", "| 编号 | " + row(str(259 + pieces.index(each)) for each in ("很好", "房间", "很", "小")))
    says("tokenizer", "| `ids` | " + row(map(str, example.ids)), "| `loss_mask` | " + row(map(str, example.loss_mask)))
    assert tok.decode(example.ids) == "房间很小很好"
    says("tokenizer", f"`{' '.join(map(str, encode_prompt(tok, [question])))}`")
    says("tokenizer", f"`{' '.join(map(str, tok.encode('书')))}`", f"每词元 {characters_per_token(tok, LINES)} 字")


@float64
def test_model():
    says("model", f"({numbers(RMSNorm(2, 0.0)(torch.tensor([3.0, 4.0])))})", f"{math.sqrt(12.5):.4f}")
    shape = ModelConfig(dim=2, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=3, max_seq_len=3)
    turned = Rope.apply(torch.tensor([1.0, 0]).expand(1, 3, 1, 2).contiguous(), *rope_table(shape))[0, :, 0]
    assert torch.equal(turned[0], torch.tensor([1.0, 0]))
    says("model", f"({numbers(turned[1])})", f"({numbers(turned[2])})")
    products = turned @ turned.T
    torch.testing.assert_close(products[0, 1], products[1, 2])
    says("model", f"{products[0, 1]:.4f}：注意力")
    attention = Attention(shape)
    for weight in attention.parameters():
        weight.data = torch.eye(2)
    seen = attention(torch.eye(2)[None], torch.ones(2, 2), torch.zeros(2, 1))[0]
    torch.testing.assert_close(seen[0], torch.tensor([1.0, 0]))
    says("model", f"输出 ({numbers(seen[1])})")
    says("model", f"({numbers(SwiGLU.apply(torch.tensor([1.0, -1]), torch.tensor([2.0, 3])))})")
    count = partial(count_parameters, 160, 4, 5, vocab_size=6144)
    assert ModelConfig(dim=160, n_heads=5, n_kv_heads=5).hidden_dim == 448
    assert 983_040 + 4 * (102_400 + 215_040 + 320) + 160 == count(5)
    says("model", f"{count(5):,}", f"{count(1):,}", f"{count(5, tied=False):,}")
    says("model", f"{count_parameters(160, 8, 5, 5, vocab_size=6144):,}")


def test_data(tmp_path):
    texts = ["房间很干净，早餐也不错。", "房间很干净,早餐也不错!", "电脑很轻，屏幕清楚。"]
    for text in texts:
        key = content_key(text)
        says("data", f"| {text} | {key} | {text_hash(key, 'split') / 2**64:.4f} |")
    assert content_key(texts[0]) == content_key(texts[1])
    for share, held_out in ((0.05, [False] * 3), (0.2, [False, False, True])):
        assert [is_validation(text, share) for text in texts] == held_out
    edited = texts[0].replace("也", "")
    a, b = ({key[i : i + 3] for i in range(len(key) - 2)} for key in map(content_key, (texts[0], edited)))
    assert len(a & b) / len(a | b) == 0.5
    says("data", f"{len(a)} + {len(b)} 个片段里共有 {len(a & b)} 个，并集 {len(a | b)} 个")
    signatures = np.stack([signature(texts[0]), signature(edited), signature(texts[2])])
    says("data", f"{(signatures[0] == signatures[1]).mean():.3f} 相同")
    assert near_duplicates(signatures).tolist() == [-1, 0, -1]

    make_bins(tmp_path, {"a": [5, 6, 7, 2, 8, 9, 2]})
    x, y = Corpus(tmp_path, "train").windows(0, 7, 6)
    says("data", f"x = {' '.join(map(str, x[0].tolist()))}，y = {' '.join(map(str, y[0].tolist()))}")
    documents = document_numbers(torch.tensor([[5, 6, 7, 2, 8, 9, 2]]), eos_id=2)[0]
    says("data", "| 第几篇 | " + " | ".join(map(str, documents.tolist())))


@float64
def test_pretrain():
    h, one = torch.ones(1, 1), torch.ones(1)
    W = torch.tensor([[2.0], [1], [0]], requires_grad=True)  # the logits, as h is 1
    losses = [LinearCrossEntropy.apply(h, W, torch.tensor([target]), one) for target in range(3)]
    says("pretrain", f"= {losses[0]:.4f}$", f"损失 {losses[2]:.4f}", f"({numbers(torch.exp(-torch.stack(losses)))})")
    losses[0].backward()
    says("pretrain", f"({numbers(W.grad[:, 0])})")
    says("pretrain", f"= {TextLoss(3 * math.log(4), 3, 4).bits_per_char:.1f}$ 比特")

    module = nn.Module()
    module.w = nn.Parameter(torch.ones(1, 1))
    optimizer = build_optimizer(module, pretrain_config)
    for gradient in (0.5, 5.0):
        module.w.data.fill_(1)
        module.w.grad = torch.full((1, 1), gradient)
        optimizer.state.clear()
        optimizer.step()
        says("pretrain", f"得 {module.w.item():.4f}")
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = 2 * torch.eye(2)
    Muon([dict(params=[p], muon=True)], lr=0.1).step()
    says("pretrain", f"= {p[0, 0]:.4f}$")
    assert p[0, 1] == 0
    says("pretrain", "| 学习率 | " + " | ".join(f"{learning_rate(step, demo):.6f}" for step in (0, 24, 49, 675, 1300)))


class Fixed:
    """A model whose token losses are given, weighted as model.forward weighs them."""

    def __init__(self, nll):
        self.nll = nll

    def __call__(self, ids, targets, weights, documents, keep):
        return (self.nll * weights).sum()


def test_sft():
    mask = torch.tensor([[0.0, 0, 1, 1, 1], [0, 0, 0, 1, 0]])
    nll = torch.tensor([[9.0, 3, 3, 3], [9, 9, 1, 9]])  # of what ids[:, 1:] are; nobody is to read the nines
    batch = dict(ids=torch.zeros(2, 5, dtype=torch.int64), keep=None)
    found = {}
    for kind in ("token", "example"):
        weights = sft.loss_weights(mask, kind)
        found[kind] = sft.answer_loss(Fixed(nll), batch, weights / weights.sum()).item()
    says("sft", f"= {found['token']:.1f}$；甲占九成", f"= {found['example']:.1f}$；两段一样重")
    third = " ".join(f"{weight:.3g}" for weight in sft.loss_weights(mask, "example")[0].tolist())
    says("sft", f"| {third} |")
    parts = [sft.answer_loss(Fixed(nll[i : i + 1]), batch, mask[i : i + 1] / mask.sum()).item() for i in range(2)]
    assert sum(parts) == found["token"]
    says("sft", f"得 {parts[0]:.2f} 和 {parts[1]:.2f}")
