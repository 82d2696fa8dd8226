"""A chain of runs as one HTML page to keep: what came from what, how, on which data, and what it can do.

    python -m common.report out/demo

in:  a folder of runs (ckpt.pt, config.json, metrics.jsonl, samples.txt, *.png), reports in it, and the data they name
out: report.html, its pictures within; it runs no script and asks for nothing from elsewhere
"""

import common.early  # noqa: F401 - before what takes seconds to import

import argparse
import platform
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch

from common import config
from common.checkpoint import git_commit
from common.config import UserError, options_of
from common.family import Box, draw
from common.files import file_sha256, is_ours, read_json, refuse_foreign, signed, write_file
from common.markup import Html, from_markdown, join, picture, problem, table, tag
from common.metrics import is_number, read_metrics
from common.runs import NAME, Entry, by_content, find_checkpoints, find_folders, last_values, read_entry, read_samples

STYLES = [Path(__file__).with_name(name) for name in ("palette.css", "report.css")]
STAGES = dict(  # stage of a checkpoint: its name, its script
    pretrain=("预训练", "pretrain"),
    sft=("指令微调", "sft"),
    rm=("奖励模型", "rm_train"),
    dpo=("DPO", "dpo_train"),
    ppo=("PPO", "ppo_train"),
    grpo=("GRPO", "grpo_train"),
    quantize=("量化", "quantize"),
)
LABELS = {
    "val/loss": "验证损失",
    "val/bits_per_char": "每字比特",
    "val/accuracy": "判对的比例",
    "val/accuracy_low": "95% 区间下端",
    "val/accuracy_high": "95% 区间上端",
    "val/margin": "好差回答奖励之差",
    "val/chosen_logratio": "好回答 log π/π_ref",
    "val/rejected_logratio": "差回答 log π/π_ref",
    "val/chosen_logps": "好回答 log π",
    "val/rejected_logps": "差回答 log π",
    "val/longer_wins": "较长者得分高的比例",
    "val/chosen_score": "好回答得分",
    "val/rejected_score": "差回答得分",
    "val/ece": "校准误差",
    "val/score": "得分",
    "val/kl": "KL（nat/回答）",
    "val/length": "回答长度（词元）",
    "val/eos_rate": "说完的比例",
    "val/distinct_2": "distinct-2",
    "quantize/perplexity_float32": "float32 困惑度",
    "quantize/perplexity_quantized": "量化后困惑度",
    "quantize/perplexity_ratio": "困惑度之比",
    "quantize/float32_weight_bytes": "float32 权重字节",
    "quantize/file_bytes": "文件字节",
    "quantize/tokenizer_bytes": "其中分词器字节",
    "quantize/file_ratio": "大小之比",
}
REPORTS = ("report.md", "quantize.md")  # shown, as is every other .md that ends with our mark
SHARED, ALONE = 8, 3  # prompts shown that several runs answered, and of each run those that only it did
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass
class Run:
    """A folder in which a stage wrote."""

    name: str
    folder: Path
    files: list[str]
    entry: Entry | None  # of its ckpt.pt
    rows: list[dict] = field(default_factory=list)  # of its metrics.jsonl
    samples: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return self.entry.stage if self.entry else ""

    @property
    def pictures(self) -> list[Path]:
        return [self.folder / name for name in sorted(self.files) if name.endswith(".png")]


def title_of(stage: str) -> str:
    return STAGES.get(stage, (stage or "阶段未知", ""))[0]


def read_run(name: str, folder: Path, files: list[str], entry: Entry | None) -> Run:
    """All that a run's folder tells; what cannot be read becomes one of its problems."""
    run = Run(name, folder, files, entry)
    if entry is None:
        run.problems.append("没有 ckpt.pt")
    elif entry.problem:
        run.problems.append(f"ckpt.pt：{entry.problem}")
    try:
        if "metrics.jsonl" in files:
            run.rows = read_metrics(folder / "metrics.jsonl")
            written = (folder / "metrics.jsonl").read_bytes().split(b"\n")
            if lost := sum(map(bool, map(bytes.strip, written))) - len(run.rows):
                run.problems.append(f"metrics.jsonl：有 {lost} 行读不懂，没有计入")
        if "samples.txt" in files:
            run.samples = read_samples(folder / "samples.txt")
        run.config = entry.config if entry else {}
        if not run.config and "config.json" in files:
            run.config = read_json(folder / "config.json")
    except (OSError, UserError) as error:
        run.problems.append(str(error))
    return run


def read_runs(root: Path) -> tuple[list[Run], dict[str, Entry], dict[str, tuple[Path, list[str]]]]:
    """The runs under a folder, from pretraining on; each checkpoint by its id; all folders as find_folders has them."""
    folders = find_folders(root)
    entries = {name: read_entry(name, path, key, whole=True) for name, path, key in find_checkpoints(folders)}
    runs = [
        read_run(name, folder, files, entries.get(name))
        for name, (folder, files) in folders.items()
        if "metrics.jsonl" in files or any(map(NAME.fullmatch, files))
    ]
    order = list(STAGES)
    runs.sort(key=lambda run: (order.index(run.stage) if run.stage in order else len(order), run.name))
    return runs, entries, folders


def hash_of(entry: Entry) -> str | None:
    with suppress(OSError):
        return file_sha256(entry.path)


# the sections of the page


def family(entries: dict[str, Entry], hashes: dict[str, str | None]) -> Html:
    """The tree. Of a run's older checkpoints only those are drawn that something came from."""
    names, parents = by_content(hashes), {(entry.parent or {}).get("sha256") for entry in entries.values()}
    boxes = []
    for name, entry in entries.items():
        digest = hashes[name]
        plain, at, _ = name.rpartition("@")
        if digest and names[digest] != name or at and plain in entries and digest not in parents:
            continue
        facts = f"{title_of(entry.stage)} · 第 {entry.step:,} 步" if entry.stage else "读不了"
        lines = facts, f"sha256 {(digest or '？')[:8]}" + "，已损坏" * bool(entry.problem)
        boxes.append(Box(digest or f"id:{name}", name, lines, (entry.parent or {}).get("sha256")))
    here = {box.id for box in boxes}
    lost = {entry.parent["sha256"]: entry.parent for entry in entries.values() if entry.parent}
    for digest, parent in lost.items():
        if digest not in here:
            lines = "不在这里，或后来变了", f"sha256 {digest[:8]}"
            boxes.append(Box(digest, f"{title_of(parent['stage'])} {parent['path']}", lines, lost=True))
    hidden = len(entries) - sum(not box.lost for box in boxes)
    said = "箭头从父检查点指向由它训练出来的检查点，凭子检查点里记下的父文件 sha256 连线，不凭文件名。"
    said += f"另有 {hidden} 个较早的或内容相同的检查点没有画出。" * bool(hidden)
    return join([tag("p", said, class_="hint"), tag("div", draw(boxes), class_="wide") if boxes else None])


def figure_text(values: dict) -> str:
    found = {key: value for key, value in values.items() if key.startswith(("val/", "quantize/")) and is_number(value)}
    return " · ".join(f"{label_of(key)} {number(value)}" for key, value in found.items())


def label_of(key: str) -> str:
    """What a metric is called; of one by source, such as val/bits_per_char/poems, the source too."""
    name, _, source = key.rpartition("/")
    return LABELS.get(key) or (f"{LABELS[name]}（{source}）" if name in LABELS else key)


def number(value) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def key_figures(runs: list[Run]) -> Html:
    rows = []
    for run in runs:
        seconds = max((row["seconds"] for row in run.rows if is_number(row.get("seconds"))), default=None)
        spent = "" if seconds is None else str(timedelta(seconds=round(min(seconds, 1e9))))
        row = [run.name, title_of(run.stage)]
        if run.stage:
            row += [f"{run.entry.step:,}", f"{run.entry.tokens_seen:,}", f"{run.entry.parameters / 1e6:.2f} M"]
        else:
            row += [f"{max((row['step'] for row in run.rows), default=0):,}", "", ""]
        rows.append([*row, spent, figure_text(last_values(run.rows))])
    head = ["训练", "阶段", "步数", "读过的词元", "参数", "用时", "最后一次验证"]
    return tag("div", table(head, rows), class_="figures")


def data_reports(runs: list[Run], root: Path) -> Html:
    """report.md and the recorded commands of each data folder that a run names, from here or from a folder above it."""
    bases = Path(), *root.resolve().parents
    folders = dict.fromkeys(run.config["data"] for run in runs if isinstance(run.config.get("data"), str))
    parts = []
    for name in folders:
        parts.append(tag("h3", name))
        try:
            there = (base / name for base in bases if (base / name / "report.md").is_file())
            folder = next(there, Path(name))
            source = (folder / "report.md").read_text(encoding="utf-8", errors="replace")
            shown = from_markdown(source.removeprefix(f"# {name}\n"), folder, 3)
            commands = read_json(folder / "meta.json").get("command")
        except (OSError, UserError, ValueError) as error:  # ValueError: a name that no path can have
            why = getattr(error, "strerror", None) or error
            parts.append(problem(f"数据的报告读不到（{why}）。请在训练时的文件夹里运行。"))
            continue
        said = commands.values() if isinstance(commands, dict) else ()
        parts += [tag("pre", command) for command in dict.fromkeys(map(str, said))] + [shown]
    return join(parts)


def stages(runs: list[Run]) -> Html:
    parts = []
    for run in runs:
        plots = [picture(path, f"{run.name}/{path.name}") for path in run.pictures]
        if plots or run.problems:
            parts.append(tag("h3", f"{run.name} · {title_of(run.stage)}"))
        parts += [problem(said) for said in run.problems]
        parts.append(tag("div", *plots, class_="plots") if plots else None)
    return join(parts)


def last_pairs(run: Run) -> dict[tuple[str, str], str]:
    """{(prompt, who replied): reply} of a run's last step; quantize.py writes there what each precision replied."""
    found = {}
    for block in run.samples:
        for pair in block["pairs"] if block["step"] == run.samples[-1]["step"] else ():
            label = (
                re.fullmatch(r"(?s)\[(float32|int8|int4)\] (.*)", pair["prompt"]) if run.stage == "quantize" else None
            )
            prompt, who = (label[2], f"{run.name}，{label[1]}") if label else (pair["prompt"], run.name)
            found[prompt, f"{who} · 第 {block['step']:,} 步"] = pair["reply"]
    return found


def began_from_parent(run: Run) -> bool:
    """Whether the first replies in samples.txt are those of the checkpoint that alignment started from."""
    return run.stage in ("dpo", "ppo", "grpo") and bool(
        run.samples and run.samples[0]["step"] == 0 and run.entry.parent
    )


def samples(runs: list[Run]) -> Html:
    """Replies to the prompts that several runs answered, side by side; then what one run said at first and at last."""
    replies = {}
    for run in runs:
        before = {pair["prompt"]: pair["reply"] for pair in run.samples[0]["pairs"]} if began_from_parent(run) else {}
        for (prompt, who), reply in last_pairs(run).items():
            if prompt not in replies and prompt in before:
                replies[prompt] = [(f"{run.name} 开始之前，即{title_of(run.entry.parent['stage'])}", before[prompt])]
            replies.setdefault(prompt, []).append((who, reply))
    shared = [(prompt, told) for prompt, told in replies.items() if len(told) > 1]
    shared.sort(key=lambda item: -len(item[1]))
    parts = [side_by_side(prompt, told) for prompt, told in shared[:SHARED]]
    if len(shared) > SHARED:
        parts.append(tag("p", f"另有 {len(shared) - SHARED} 个共同的提示，见各训练的 samples.txt。", class_="hint"))
    for run in runs:
        own = [prompt for prompt, _ in last_pairs(run) if len(replies.get(prompt, ())) == 1]
        if own:
            parts.append(tag("h3", f"{run.name}：只有它回答过的提示，从第一次到最后一次"))
        for prompt in dict.fromkeys(own[:ALONE]):
            told = [(f"第 {block['step']:,} 步", pair["reply"])
                    for block in run.samples for pair in block["pairs"] if pair["prompt"] == prompt]  # fmt: skip
            parts.append(side_by_side(prompt, told[:1] + told[1:][-1:]))
    return join(parts)


def side_by_side(prompt: str, told: list[tuple[str, str]]) -> Html:
    cards = [tag("div", tag("p", who, class_="hint"), tag("p", reply), class_="reply") for who, reply in told]
    return join([tag("p", prompt or "（空提示）", class_="prompt"), tag("div", *cards, class_="replies")])


def comparisons(runs: list[Run], folders: dict[str, tuple[Path, list[str]]]) -> Html:
    """The reports in Markdown under the folder, and pictures that are of no run."""
    parts, of_runs = [], {run.folder for run in runs}
    for folder, names in folders.values():
        for path in (folder / name for name in sorted(names) if name.endswith(".md")):
            try:
                if path.name in REPORTS or is_ours(path):
                    source = path.read_text(encoding="utf-8", errors="replace")
                    parts += [tag("h3", str(path)), from_markdown(source, folder, 4)]
            except OSError as error:
                parts.append(problem(str(error)))
        if folder not in of_runs:
            parts += [picture(folder / name, name) for name in sorted(names) if name.endswith(".png")]
    return join(parts)


def quantization(runs: list[Run]) -> Html:
    """A row for each quantized checkpoint."""
    rows, last = [], {run.name: last_values(run.rows) for run in runs}
    quantized = [run for run in runs if run.entry and run.entry.quant]
    known = dict.fromkeys(key for run in quantized for key in last[run.name] if key.startswith("quantize/"))
    for run in quantized:
        values = [last[run.name].get(key) for key in known]
        source = run.entry.parent["path"] if run.entry.parent else ""
        rows.append([run.name, run.entry.quant, source, *(number(v) if is_number(v) else "" for v in values)])
    return table(["检查点", "方法", "量化之前", *(label_of(key) for key in known)], rows) if rows else Html()


def command_of(run: Run) -> str:
    """What makes this run again, told by its resolved config; "" where that is not known."""
    _, script = STAGES.get(run.stage, ("", ""))
    if not script or not run.config:
        return ""
    if run.config.get("import_hf") or run.config.get("import_llama2c"):
        script = "export"
    try:
        asked = {key: value for key, value in run.config.items() if key not in ("resume", "overwrite")}
        options = options_of(script, asked)
        n = run.config.get("processes", 1)
    except (UserError, RecursionError) as error:  # what somebody wrote into it
        return f"# {error}"
    launcher = f"torchrun --standalone --nproc_per_node={n}" if isinstance(n, int) and n > 1 else "python"
    return f"{launcher} {script}.py {shlex.join(options)}"


def commands(runs: list[Run], folders: dict[str, tuple[Path, list[str]]]) -> Html:
    parts = [tag("p", "由各训练记下的完整配置得出：写出的是与 configs/ 里默认值不同的设置。", class_="hint")]
    for folder, names in folders.values():
        if {"tokenizer.vocab", "config.json"} <= set(names):
            with suppress(UserError, OSError, RecursionError):
                options = options_of("tokenizer", read_json(folder / "config.json"))
                parts.append(tag("pre", f"python -m tokenizer.train {shlex.join(options)}"))
    parts += [tag("pre", command) for command in map(command_of, runs) if command]
    return join(parts)


def versions(entries: dict[str, Entry], hashes: dict[str, str | None]) -> Html:
    here = f"Python {platform.python_version()}，torch {torch.__version__}，代码提交 {git_commit() or '未知'}"
    rows = [
        [name, f"{entry.bytes:,}", entry.git_commit or "未知", hashes[name] or "读不到"]
        for name, entry in entries.items()
    ]
    return join([tag("p", f"写这份报告的是 {here}。"), table(["检查点", "字节", "训练时的代码提交", "sha256"], rows)])


def page(root: Path) -> tuple[str, int]:
    """(the page, how many runs it shows)."""
    runs, entries, folders = read_runs(root)
    if not runs:
        raise UserError(f"{root}: no run in it, which has a ckpt.pt or metrics.jsonl; give a folder such as out/demo")
    hashes = {name: hash_of(entry) for name, entry in entries.items()}
    sections = dict(
        家谱=family(entries, hashes),
        关键数字=key_figures(runs),
        数据=data_reports(runs, root),
        各阶段=stages(runs),
        样例=samples(runs),
        比较=comparisons(runs, folders),
        量化=quantization(runs),
        命令=commands(runs, folders),
        版本与校验=versions(entries, hashes),
    )
    sections = {name: content for name, content in sections.items() if content}
    title = f"训练报告：{root.resolve().name}"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html("".join(path.read_text(encoding="utf-8") for path in STYLES))),
    ]
    links = [tag("a", name, href=f"#{name}") for name in sections]
    said = f"{root} 里的 {len(runs)} 次训练。图都在这个文件里，断网也能看，可以打印。"
    body = [tag("h1", title), tag("p", said, class_="hint"), tag("nav", *links)]
    body += [tag("section", tag("h2", name), content, id=name) for name, content in sections.items()]
    html = tag("html", tag("head", *head), tag("body", *body), lang="zh-CN")
    return f"<!DOCTYPE html>\n{html}\n", len(runs)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.report", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="the folder of the runs, such as out/demo")
    parser.add_argument("--out", help="the page (FOLDER/report.html)")
    args = parser.parse_args(argv)
    root = Path(args.folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give one with runs in it, such as out/demo")
    out = Path(args.out or root / "report.html")
    refuse_foreign(out, ".html")
    html, n = page(root)
    write_file(out, signed(html))
    print(f"wrote {out}: {n} runs, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    config.run(main)
