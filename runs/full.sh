#!/usr/bin/env bash
# A full-size run on one GPU or several, from corpora of your own to an aligned, quantized model. SOURCES needs one for
# pretraining, one of conversations and one of preferences: python data_process.py --list_sources shows what it may name.
# usage: TOKENIZER=tokenizer.model SOURCES=wikipedia=wiki.json,chat:alpaca=sft.json,better:pairs=pairs.jsonl \
#     bash runs/full.sh [GPUS]
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/setup.sh requirements.txt
gpus=${1:-1}
: "${TOKENIZER:?a SentencePiece tokenizer.model, its folder, or a Hugging Face id}"
: "${SOURCES:?names or NAME=PATH of corpora, with commas between}"
train=(torchrun --standalone --nproc_per_node="$gpus")

python data_process.py --out=data/zh --tokenizer="$TOKENIZER" --sources="$SOURCES" \
    --parts=pretrain,sft,rm,prompts --dedup=near --max_seq_len=512
"${train[@]}" pretrain.py --tokenizer="$TOKENIZER" --resume
"${train[@]}" sft.py --resume
"${train[@]}" rm_train.py --resume
"${train[@]}" dpo_train.py --resume
"${train[@]}" ppo_train.py --resume
"${train[@]}" grpo_train.py --resume
python quantize.py --resume
python eval_generate.py --data=data/zh --compare=out/zh/sft,out/zh/dpo,out/zh/ppo,out/zh/grpo,out/zh/quantize \
    --reward_model=out/zh/rm --report=out/zh/report.md
