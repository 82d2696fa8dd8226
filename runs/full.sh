#!/usr/bin/env bash
# A full-size run on one GPU or several, from reviews of your own in the demo's layout to an aligned, quantized model.
# usage: TOKENIZER=path/to/tokenizer.model POSITIVE=good.txt NEGATIVE=bad.txt NEWS=news.txt bash runs/full.sh [GPUS]
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/setup.sh requirements.txt
gpus=${1:-1}
: "${TOKENIZER:?a SentencePiece tokenizer.model, its folder, or a Hugging Face id}"
: "${POSITIVE:?positive reviews, one a line}" "${NEGATIVE:?negative reviews, one a line}" "${NEWS:?word/tag lines}"
train=(torchrun --standalone --nproc_per_node="$gpus")

python data_process.py --out=data/zh --tokenizer="$TOKENIZER" --max_seq_len=512 \
    --positive="$POSITIVE" --negative="$NEGATIVE" --people_daily="$NEWS"
"${train[@]}" pretrain.py --tokenizer="$TOKENIZER" --resume
"${train[@]}" sft.py --resume
"${train[@]}" rm_train.py --resume
"${train[@]}" dpo_train.py --resume
python ppo_train.py --resume
python quantize.py --resume
python eval_generate.py --data=data/zh --compare=out/zh/sft,out/zh/dpo,out/zh/ppo,out/zh/quantize --report=out/zh/report.md
