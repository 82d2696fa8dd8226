"""Where a model comes from, as it travels with an exported file, and the model card made of it."""

import hashlib
from contextlib import suppress
from pathlib import Path

from common.checkpoint import Checkpoint
from common.metrics import is_number, read_metrics
from common.runs import last_values
from common.tables import markdown_table
from dataset.formats import DataError, load_meta
from model import ModelConfig

# the parts of the data that a stage learns from; a quantized model's are those of the stage before
READS = dict(pretrain=["pretrain"], sft=["sft"], rm=["rm"], dpo=["rm"], ppo=["prompts"], grpo=["prompts"])

CARD = """\
---
language: zh
library_name: transformers
pipeline_tag: {task}
license: other
license_name: see-below
tags: [llama, tiny-llama2-zh]
---
# tiny-llama2-zh {stage}

用 tiny-llama2-zh 训练的中文小模型。结构就是原版 Llama 2，`transformers` 读它不需要 `trust_remote_code`。

{table}

## 训练数据

{data}

## 许可

训练代码是 MIT。权重的许可由发布者填写：先核对每份训练数据的许可，再改这一节和文件开头的 `license`。
"""


def provenance(ckpt: Checkpoint) -> dict:
    """Facts of a checkpoint and, as far as they are still there, of its run directory and its data."""
    keys = ("stage", "step", "tokens_seen", "model_config", "document_ids", "quant", "config", "parent", "git_commit")
    facts = {key: getattr(ckpt, key) for key in keys}
    facts["tokenizer_sha256"] = hashlib.sha256(ckpt.tokenizer).hexdigest()
    rows = [row for row in read_metrics(ckpt.path.parent / "metrics.jsonl") if row["step"] <= ckpt.step]
    facts["metrics"] = {key: value for key, value in last_values(rows).items() if not key.startswith("train/")}
    with suppress(DataError, OSError, KeyError):
        tally = load_meta(Path(ckpt.config["data"]))["tally"]
        rows = ((part, source, counts) for part, sources in tally.items() for source, counts in sources.items())
        stage = ckpt.parent["stage"] if ckpt.stage == "quantize" and ckpt.parent else ckpt.stage
        read = READS.get(stage, ())
        facts["data"] = {f"{part}/{source}": counts["kept"] for part, source, counts in rows if part in read}
    return facts


def model_card(ckpt: Checkpoint, dtype: str) -> str:
    """README.md of a Hugging Face folder, in Chinese like its readers; the licence is for the publisher to decide."""
    facts, config = provenance(ckpt), ModelConfig(**ckpt.model_config)
    n_parameters = sum(weight.numel() for weight in ckpt.weights.values())
    rows = [
        ("参数量", f"{n_parameters:,}（{dtype}）"),
        ("结构", f"dim {config.dim}，{config.n_layers} 层，{config.n_heads} 头，{config.n_kv_heads} KV 头"),
        ("词表，上下文", f"{config.vocab_size:,}，{config.max_seq_len}"),
        ("阶段", f"{ckpt.stage}，第 {ckpt.step:,} 步，读过 {ckpt.tokens_seen:,} 词元"),
        ("上一阶段", f"{ckpt.parent['stage']}，sha256 {ckpt.parent['sha256'][:16]}" if ckpt.parent else "无"),
        ("代码提交", (ckpt.git_commit or "未知")[:12]),
        *((key, f"{value:.4g}") for key, value in facts["metrics"].items() if is_number(value)),
    ]
    data = [f"- {source}：{kept:,} 条" for source, kept in facts.get("data", {}).items()]
    return CARD.format(
        task="text-classification" if config.scalar_head else "text-generation",
        stage=ckpt.stage,
        table=markdown_table(["项", "值"], rows),
        data="\n".join(data) or f"未记录（{ckpt.config.get('data', '不是本项目训练的')}）。",
    )
