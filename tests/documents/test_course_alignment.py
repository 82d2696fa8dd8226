"""The worked examples of the course, from the reward model to export: what the pages say is what the stages compute."""

import re

import gguf
import torch

import dpo_train
import grpo_train
import ppo_train
import rm_train
from alignment.objective import policy_loss, wins
from docs.links import ROOT
from interop.gguf import tensor_type
from interop.hf import pairs_to_halves
from lowbit.gptq import dequantize, gptq, inverse_factor, quantize_int4
from model import ModelConfig, Rope, rope_table
from quantize import input_hessian, output_error, quantize_int8


def section(page, heading):
    text = (ROOT / f"docs/course/{page}.md").read_text(encoding="utf-8")
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(1)


def holds(page, *lines):
    """That the worked example of a page says each of these lines or parts of lines."""
    text = section(page, "手算一个例子")
    assert [line for line in lines if line not in text] == []


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def test_reward_model_page():
    chosen, rejected = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([0.5, 0.5, 0.0])
    loss, right = rm_train.reward_loss(chosen, rejected), wins(chosen, rejected)
    others = rm_train.reward_loss(chosen, rejected, margin=1.0), rm_train.reward_loss(chosen, rejected, centring=0.01)
    for c, r, w, *losses in zip(chosen.tolist(), rejected.tolist(), right.tolist(), loss, *others, strict=True):
        holds("rm", row(c, r, c - r, w, *(f"{each:.4f}" for each in losses)))
    bins = rm_train.calibration((chosen - rejected).numpy(), 1)
    holds("rm", f"平均损失是 {loss.mean():.4f}，正确率是 {right.mean():.4f}", f"平局的损失就是 ln 2 = {loss[1]:.4f}")
    holds("rm", f"σ(1.5) = {torch.sigmoid(chosen - rejected)[0]:.4f}，")
    holds("rm", f"校准误差是 {rm_train.calibration_error(bins):.4f}：平均把握 {bins[0][1]:.4f}，")


def test_dpo_page():
    logps, ref, tokens = (torch.tensor(x)[:, None] for x in ([-10.0, -13.0], [-11.0, -12.0], [4.0, 5.0]))
    losses, starts = {}, {}
    for kind in ("sigmoid", "cdpo", "ipo"):
        loss, rewards = dpo_train.dpo_loss(logps, ref, tokens, 0.5, kind, 0.1)
        start, _ = dpo_train.dpo_loss(ref, ref, tokens, 0.5, kind, 0.1)
        losses[kind], starts[kind] = f"{loss.item():.4f}", f"{start.item():.4f}"
    wrong = dpo_train.dpo_loss(logps.flip(0), ref.flip(0), tokens, 0.5)[0].item()
    for name, p, r, n, reward in zip(("好的", "差的"), logps, ref, tokens, rewards, strict=True):
        holds("dpo", row(name, p.item(), r.item(), int(n), (p - r).item(), f"{reward.item():.4f}"))
    holds("dpo", row("sigmoid", "−ln σ(1)", losses["sigmoid"]), row("ipo", "(1/4 + 1/5 − 1)²", losses["ipo"]))
    holds("dpo", row("cdpo", f"0.9 × {losses['sigmoid']} + 0.1 × {wrong:.4f}", losses["cdpo"]))
    assert starts["sigmoid"] == starts["cdpo"]
    holds("dpo", f"sigmoid 和 cdpo 的损失都是 ln 2 = {starts['cdpo']}，ipo 是 $(1/(2\\beta))^2$ = {starts['ipo']}")


def test_ppo_page():
    mask = torch.tensor([[0, 1.0, 1, 1, 0]])
    logps, ref, values = (torch.tensor([[0, *x, 0]]) for x in ([-1.0, -2, -0.5], [-1.5, -1.5, -0.5], [0.2, 0.4, 0.6]))
    rewards = ppo_train.penalised_rewards(torch.ones(1), logps, ref, mask, 0.1)
    deltas, _ = ppo_train.gae(rewards, values, mask, 1.0, 0.0)
    advantages, returns = ppo_train.gae(rewards, values, mask, 1.0, 0.5)
    white = ppo_train.masked_whiten(advantages, mask)
    columns = (logps, ref, rewards, values, deltas, advantages, returns, white)
    forms = ".1f .1f .3f .1f .3f .4f .4f .4f".split()
    for i in (1, 2, 3):
        holds("ppo", row(i, *(format(x[0, i].item(), form) for x, form in zip(columns, forms, strict=True))))
    whole = ppo_train.gae(rewards, values, mask, 1.0, 1.0)[1][0, 1:4].tolist()
    holds("ppo", "往后的奖励之和：" + "、".join(f"{each:.4f}" for each in whole))
    one = torch.ones(1, 1)
    for advantage in (1.0, -1.0):
        losses = [policy_loss((ratio * one).log(), 0 * one, advantage * one, one, 0.2) for ratio in (1.5, 0.9, 0.5)]
        holds("ppo", row(advantage, *(f"{loss.item():.2f}" for loss in losses)))
    loss = ppo_train.value_loss(0.9 * one, 0.2 * one, 0.3 * one, one, 0.2)
    holds(
        "ppo",
        f"旧值 0.2、新值 0.9、回报 0.3、截断 0.2。截到 0.4，误差 0.01；没截的 0.36 更大，取它的一半：{loss.item():.4f}",
    )
    above, little, none = (ppo_train.adapt_kl_coef(0.02, kl, 6.0, 50.0) for kl in (9, 6.6, 0))
    holds("ppo", f"KL 为 9 时变成 {above:.4f}，为 6.6 时 {little:.4f}，为 0 时 {none:.4f}")


def test_grpo_page():
    scores, mask = torch.tensor([1.0, 0.5, -0.5, 1.0]), torch.ones(4, 1)
    logps, ref = (torch.tensor(x)[:, None] for x in ([-3.0, -4, -5, -6], [-4.0, -4, -4, -8]))
    rewards = grpo_train.penalised_rewards(scores, logps, ref, mask, 0.1)
    kinds = ("grpo", "dr_grpo", "rloo")
    advantages = [grpo_train.group_advantages(rewards, 4, loss) for loss in kinds]
    for i in range(4):
        given = (scores[i].item(), logps[i].item(), ref[i].item(), f"{rewards[1, i].item() + 0:.2f}")
        holds("grpo", row(i + 1, *given, *(f"{each[i].item():.4f}" for each in advantages)))
    holds("grpo", f"平均惩罚 −{-rewards[1].mean().item():.2f}，得分的标准差 {scores.std().item():.4f}")
    mask, logps = torch.tensor([[1.0, 0, 0], [1, 1, 1]]), torch.zeros(2, 3, requires_grad=True)
    weights = dict(grpo=("1/2", "1/6"), dr_grpo=("1/8", "1/8"), rloo=("整条 1/2", "整条 1/2"))
    for loss in kinds:
        config = dict(loss=loss, max_new_tokens=4, cliprange=0.2)
        value, _ = grpo_train.group_loss(logps, torch.zeros(2, 3), torch.ones(2, 1), mask, 2, config)
        (grad,) = torch.autograd.grad(value, logps)  # at a ratio of 1 the weight of each token, negated
        top, bottom = (each.removeprefix("整条 ").split("/") for each in weights[loss]), (-grad[0, 0], -grad[1, 0])
        for (a, b), weight in zip(top, bottom, strict=True):
            torch.testing.assert_close(weight.item(), int(a) / int(b), rtol=1e-6, atol=0)
        holds("grpo", row(loss, *weights[loss], f"{value.item():.4f}"))


def test_quantize_page():
    weight = torch.tensor([[0.30, -0.55, 0.10, 1.27]])

    def numbers(q, restored):
        return [f"{n} ({w:.4f})" for n, w in zip(q.flatten().tolist(), restored.flatten().tolist(), strict=True)]

    q, scale = quantize_int8(weight)
    restored = q.float() * scale.float()[:, None]
    holds("quantize", row("int8", f"{scale.item():.4f}", 0, *numbers(q, restored)), f"是 {scale.item():.5f}。")
    for name, size in (("int4，一组四列", 4), ("int4，一组两列", 2)):
        q, scale, zero = quantize_int4(weight, size, False)
        scales, zeros = "、".join(f"{s:.4f}" for s in scale[0].tolist()), "、".join(map(str, zero[0].tolist()))
        restored = dequantize(q.float().unflatten(1, (-1, size)), scale, zero)
        holds("quantize", row(name, scales, zeros, *numbers(q, restored)))

    weight, hessian = torch.tensor([[0.9375, 0.30]]), input_hessian([torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, -1]])])
    holds("quantize", f"H = {hessian.int().tolist()}；")
    u = inverse_factor(hessian, 0.0)
    holds("quantize", f"第一行是 {u[0, 0]:.4f}、{u[0, 1]:.4f}。", f"0.30 + 0.0625 × {-u[0, 1]:.4f}/{u[0, 0]:.4f} = ")
    updated = weight[0, 1] - (0.9375 - 0.875) / u[0, 0] * u[0, 1]
    nearest = quantize_int4(weight, 2, True)
    better = gptq(weight, hessian, 2, True, damping=0.0, act_order=False, search=False)
    restored = [dequantize(q.float()[:, None], s, z)[:, 0] for q, s, z in (nearest, better)]
    said = (
        f"取 {nearest[0][0, 1]}，还原 {restored[0][0, 1].item():g}。",
        f"还原 {restored[0][0, 0].item():g}，差 0.0625",
    )
    holds("quantize", *said, f"= {updated.item():.5f}，", f"取 {better[0][0, 1]}，还原 {restored[1][0, 1].item():g}。")
    before, after = (output_error(weight, each, hessian) for each in restored)
    holds("quantize", f"输出的相对误差从 {before:.4f} 降到 {after:.4f}")


def test_export_page():
    order = pairs_to_halves(torch.arange(8.0)[:, None], 2).flatten().int().tolist()
    holds("export", "次序是 " + " ".join(map(str, order)))
    config = ModelConfig(dim=4, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=8, max_seq_len=2)
    cos, sin = (table[1:] for table in rope_table(config))
    q = torch.tensor([1.0, 0, 2, 1])
    ours = Rope.apply(q.view(1, 1, 1, 4), cos, sin).flatten()
    halves = pairs_to_halves(q[:, None], 1).flatten()
    angles = torch.tensor([1.0, 0.01]).repeat(2)
    theirs = halves * angles.cos() + torch.cat([-halves[2:], halves[:2]]) * angles.sin()  # transformers' rotate_half
    for name, before, after in (("本项目", q, ours), ("transformers", halves, theirs)):
        numbers = ", ".join(f"{x:g}" for x in before.tolist()), ", ".join(f"{x:.4f}" for x in after.tolist())
        holds("export", row(name, *numbers))
    torch.testing.assert_close(pairs_to_halves(ours[:, None], 1).flatten(), theirs)
    weight = torch.ones(160, 160)
    for dtype in ("float32", "bfloat16", "float16", "q8_0", "q4_0"):
        kind = tensor_type("layers.0.attention.wq.weight", weight, config, dtype)
        holds("export", row(dtype, f"{gguf.quants.quantize(weight.numpy(), kind).nbytes:,}"))
