"""The pictures of the course from the reward model to export; `python -m docs.course.pictures` draws them."""

from types import SimpleNamespace

import gguf
import numpy as np
import torch

from alignment.objective import policy_loss
from common.plots import new_figure
from dpo_train import dpo_loss
from grpo_train import group_advantages
from interop.gguf import tensor_type
from lowbit.gptq import dequantize, gptq, quantize_int4
from ppo_train import gae
from quantize import output_error, quantize_int8
from rm_train import reward_loss


def finish(axes, x, y):
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def rm():
    """The loss of a pair against the difference of its scores."""
    difference = torch.linspace(-4, 6, 201)
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    for margin in (0.0, 1.0, 2.0):
        axes.plot(difference, reward_loss(difference, torch.zeros(201), margin), label=f"margin={margin:g}")
    axes.axvline(0, color="gray", linewidth=0.8)
    finish(axes, "分数之差（好的减差的）", "损失（nats/对）")
    return figure


def ppo():
    """The clipped objective against the ratio; what a score at the end gives to the tokens before it."""
    figure = new_figure(8.4, 3.4)
    objective, weight = figure.subplots(1, 2)
    one, ratios = torch.ones(1, 1), torch.linspace(0.4, 1.8, 141)
    for advantage in (1.0, -1.0):
        losses = [policy_loss(ratio.log() * one, 0 * one, advantage * one, one, 0.2) for ratio in ratios]
        objective.plot(ratios, [-loss for loss in losses], label=f"优势 {advantage:+g}")
    objective.axvspan(0.8, 1.2, color="gray", alpha=0.15)
    finish(objective, "概率比", "目标（越大越好）")
    n = 60
    rewards = torch.zeros(1, n)
    rewards[0, -1] = 1
    for lam in (1.0, 0.99, 0.95, 0.9):
        advantages, _ = gae(rewards, torch.zeros(1, n), torch.ones(1, n), 1.0, lam)
        weight.plot(np.arange(n), advantages[0].flip(0), label=f"lam={lam:g}")
    finish(weight, "离最后一个词元多远（词元）", "得分直接传到的份额")
    return figure


def grpo():
    """The advantage of a reply with score 1 against how many of its group of eight have it; the others have 0."""
    figure = new_figure(6.4, 3.2)
    axes, right = figure.add_subplot(), np.arange(1, 9)
    for loss in ("grpo", "dr_grpo", "rloo"):
        scores = torch.tensor([[1.0] * n + [0.0] * (8 - n) for n in right]).flatten()
        advantages = group_advantages(torch.stack([scores, torch.zeros_like(scores)]), 8, loss)
        axes.plot(right, advantages.view(8, 8)[:, 0], marker="o", markersize=4, label=loss)
    finish(axes, "一组 8 个回答里得 1 分的个数", "其中一个的优势")
    return figure


def dpo():
    """The loss of a pair against how much more the policy than the reference prefers the chosen answer."""
    h = torch.linspace(-10, 20, 301)
    logps, none, tokens = torch.stack([h, torch.zeros(301)]), torch.zeros(2, 301), torch.full((2, 301), 20.0)
    figure = new_figure(8.4, 3.4)
    sigmoid, ipo = figure.subplots(1, 2)
    for kind, beta in (("sigmoid", 0.1), ("sigmoid", 0.2), ("sigmoid", 0.5), ("cdpo", 0.5)):
        sigmoid.plot(h, dpo_loss(logps, none, tokens, beta, kind, 0.1)[0], label=f"{kind} beta={beta:g}")
    for beta in (0.5, 1.0, 2.0):
        ipo.plot(h / 20, dpo_loss(logps, none, tokens, beta, "ipo")[0], label=f"ipo beta={beta:g}")
    ipo.set_ylim(0, 2)
    finish(sigmoid, "h（nats/对）", "损失")
    finish(ipo, "每词元的 h（nats/词元）", "损失")
    return figure


def quantize():
    """The error of a layer's output against the group size: random weights, inputs that go together in places."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=generator)
    inputs = torch.randn(2048, 64, generator=generator) @ torch.randn(64, 256, generator=generator)
    inputs = inputs + 2 * torch.randn(2048, 256, generator=generator)
    hessian = 2 * inputs.T @ inputs / len(inputs)
    figure, sizes = new_figure(6.4, 3.2), [32, 64, 128]
    axes = figure.add_subplot()
    made = dict(rtn=lambda g: quantize_int4(weight, g, False), gptq=lambda g: gptq(weight, hessian, g, False))
    for name, make in made.items():
        restored = []
        for size in sizes:
            q, scale, zero = make(size)
            restored.append(dequantize(q.float().unflatten(1, (-1, size)), scale, zero).flatten(1))
        errors = [100 * output_error(weight, each, hessian) for each in restored]
        axes.plot(sizes, errors, marker="o", markersize=4, label=f"int4 {name}")
    q, scale = quantize_int8(weight)
    error = 100 * output_error(weight, q.float() * scale.float()[:, None], hessian)
    axes.plot(sizes, [error] * len(sizes), label="int8（整行一个比例）")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.set_ylim(0)
    finish(axes, "group_size（列）", "输出的相对误差（%）")
    return figure


def export():
    """How many bits a weight takes in each type of a GGUF file, and how far it is off: random weights."""
    weight = torch.randn(160, 160, generator=torch.Generator().manual_seed(0))
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    for dtype in ("bfloat16", "float16", "q8_0", "q4_0"):
        kind = tensor_type("layers.0.attention.wq.weight", weight, SimpleNamespace(tied=True), dtype)
        data = gguf.quants.quantize(weight.numpy(), kind)
        error = np.linalg.norm(gguf.quants.dequantize(data, kind) - weight.numpy()) / weight.norm()
        axes.plot(8 * data.nbytes / weight.numel(), 100 * error, "o", label=dtype)
    axes.set_yscale("log")
    axes.set_xlim(0, 18)
    finish(axes, "每个权重的位数", "相对误差（%）")
    return figure


PICTURES = dict(rm=rm, ppo=ppo, grpo=grpo, dpo=dpo, quantize=quantize, export=export)
