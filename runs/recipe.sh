#!/usr/bin/env bash
# The chain of general.sh and novels.sh, whose numbers stand in configs/recipes. Run again, it skips what is finished
# and resumes what was interrupted; remove the folders that its first line names to start anew.
# SMOKE=1 runs all of it in miniature on a CPU. SOURCES, HUB, TOKENIZER, VOCAB, QUESTIONS, SPLIT: docs/recipes.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export RECIPE=${RECIPE:?general or novels} SIZE=${1:-}
gpus=${2:-1} usage="usage: bash runs/$RECIPE.sh SIZE [GPUS], such as 58m 8"
if [ $# != 1 ] && [ $# != 2 ]; then
    echo "error: a size is needed; $usage" >&2
    exit 2
fi
names='from configs.recipes import *; print(DATA, OUT, VOCAB or 0, TOKENIZER)'
if ! names=$(WORLD_SIZE=$gpus python3 -c "$names" 2>&1); then
    names=${names##*Error: }
    echo "error: ${names/WORLD_SIZE/GPUS}; $usage" >&2
    exit 2
fi
read -r data out vocab tokenizer <<< "$names"
. runs/setup.sh requirements.txt
. runs/stages.sh
began=$SECONDS
train=(python)
[ "$gpus" = 1 ] || train=(torchrun --standalone --nproc_per_node="$gpus")
echo "Recipe $RECIPE, tiny-llama2-$SIZE: data in $data, runs in $out, vocabulary $tokenizer"
[ "${SMOKE:-0}" != 1 ] || echo 'SMOKE=1: the recipe in miniature, two layers and a few steps; what its models say means nothing.'

if [ "${SMOKE:-0}" = 1 ] && [ -z "${SOURCES:-}" ]; then
    once "$data/samples/rlhf_zh.jsonl" samples python -m corpora.samples "$data/samples"
fi
if [ "$vocab" != 0 ]; then
    once "$data/corpus.txt" corpus python data_process.py configs/recipes/data.py --parts=text
    once "$tokenizer/tokenizer.model" tokenizer python -m tokenizer.train configs/recipes/tokenizer.py
fi
once "$data/prompts.pkl" data python data_process.py configs/recipes/data.py --parts=pretrain,sft,rm,prompts
stage plan python pretrain.py configs/recipes/pretrain.py --plan
stage pretrain "${train[@]}" pretrain.py configs/recipes/pretrain.py --resume
stage sft "${train[@]}" sft.py configs/recipes/sft.py --resume
stage rm "${train[@]}" rm_train.py configs/recipes/rm.py --resume
stage dpo "${train[@]}" dpo_train.py configs/recipes/dpo.py --resume
stage ppo "${train[@]}" ppo_train.py configs/recipes/ppo.py --resume
stage grpo "${train[@]}" grpo_train.py configs/recipes/grpo.py --resume
stage int8 python quantize.py configs/recipes/quantize.py --resume
stage int4 python quantize.py configs/recipes/quantize.py --method=int4 --out="$out/int4" --resume
once "$out/benchmarks.md" benchmarks python eval_generate.py --ckpt="$out/pretrain" --data="$data" \
    --benchmark=continuations,near_continuations,order,bits --report="$out/benchmarks.md"
if [ -n "${QUESTIONS:-}" ]; then
    once "$out/questions.md" questions python eval_generate.py --ckpt="$out/sft" --benchmark="$QUESTIONS" \
        --report="$out/questions.md"
fi
once "$out/report.md" compare python eval_generate.py configs/recipes/compare.py
once "$out/hf" huggingface python export.py --ckpt="$out/grpo" --format=hf --dtype=bfloat16 --out="$out/hf"
once "$out/gguf" gguf python export.py --ckpt="$out/grpo" --format=gguf --dtype=q8_0 --out="$out/gguf"
stage report python -m common.report "$out"

printf '\nDone in %d s. All of it on one page: %s/report.html\n' $((SECONDS - began)) "$out"
echo "Chat with it${to_activate:-}: python eval_generate.py --ckpt=$out/grpo, or in a browser: python web_demo.py --runs=$out"
