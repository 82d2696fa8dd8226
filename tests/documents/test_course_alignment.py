"""The worked examples of the course, from the reward model to export: what the pages say is what the stages compute."""

import re
import shlex

import pytest
import torch

import dpo_train
import rm_train
from alignment.objective import wins
from common.config import parse_config
from docs.links import ROOT

PAGES = ["rm", "dpo"]
STAGE_OF = {"alignment.ranked": "ranked"}


def section(page, heading):
    text = (ROOT / f"docs/course/{page}.md").read_text(encoding="utf-8")
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(1)


def holds(page, *lines):
    """That the worked example of a page says each of these lines or parts of lines."""
    text = section(page, "手算一个例子")
    assert [line for line in lines if line not in text] == []


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_course_have_keys_that_exist(page):
    commands = re.findall(r"^ *python (?!-c)(.+?)(?: +#.*)?$", section(page, "练习"), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        script, *argv = shlex.split(command.removeprefix("-m "))
        parse_config(STAGE_OF.get(script, script.removesuffix(".py")), argv, "")


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
    holds("dpo", f"sigmoid 和 cdpo 的损失都是 ln 2 = {starts['cdpo']}，ipo 是 (1/2β)² = {starts['ipo']}")
