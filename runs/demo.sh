#!/usr/bin/env bash
# The whole chain on real Chinese reviews, about twelve minutes on two CPU cores. Run again, it skips what is
# finished and resumes what was interrupted; remove data/demo and out/demo to start anew.
# SMOKE=1 walks it in few steps, in folders of its own: it shows that all works, and its models know nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
data=data/demo out=out/demo # as configs/demo/__init__.py has it
if [ "${SMOKE:-}" = 1 ]; then data=${data}_smoke out=${out}_smoke; fi
if [ "$out" = out/demo ]; then
    echo 'About 12 minutes and 1.2 GB of memory on two CPU cores (Intel Xeon, AVX-512), after the requirements are installed.'
    echo 'In seconds: data and tokenizer 10, pretraining 164, fine-tuning 181, reward model 28, DPO 32, PPO 106, GRPO 91,'
    echo 'int8 7, comparison 57. SMOKE=1 bash runs/demo.sh walks all of it in a few minutes, in few steps.'
    shown=(--best_of=2,4,8)
else
    echo 'SMOKE=1: every stage in few steps, a few minutes on two CPU cores; what the models say means nothing.'
    shown=(--compare_prompts=16 --compare_samples=2 --compare_examples=8 --best_of=2 --max_new_tokens=20)
fi
echo "Data goes to $data, models and plots to $out."
. runs/setup.sh requirements.txt
. runs/stages.sh
began=$SECONDS

train() { # train NAME SCRIPT: a stage that draws its curves
    stage "$1" python "$2" "configs/demo/$1.py" --resume
    echo "-- its curves: $out/$1/loss.png"
}

once "$data/corpus.txt" corpus python data_process.py configs/demo/data.py --parts=text
once "$out/tokenizer/tokenizer.model" tokenizer python -m tokenizer.train configs/demo/tokenizer.py
once "$data/prompts.pkl" data python data_process.py configs/demo/data.py --parts=pretrain,sft,rm,prompts
train pretrain pretrain.py
train sft sft.py
train rm rm_train.py
train dpo dpo_train.py
train ppo ppo_train.py
train grpo grpo_train.py
stage quantize python quantize.py configs/demo/quantize.py --resume
once "$out/report.md" compare python eval_generate.py --data="$data" --report="$out/report.md" \
    --compare="$out/sft,$out/dpo,$out/ppo,$out/grpo,$out/quantize,$out/pretrain" \
    --reward_model="$out/rm" --picture="$out/compare.png" "${shown[@]}"
stage report python -m common.report "$out"

printf '\nDone in %d s. ' $((SECONDS - began))
echo "Loss plots: $out/*/loss.png; samples: $out/*/samples.txt; comparison: $out/report.md"
echo "All of it on one page: $out/report.html"
echo "Chat with it${to_activate:-}: python eval_generate.py --ckpt=$out/ppo, or in a browser: python web_demo.py --runs=$out"
echo 'Next, a poet whose rewards are rules: bash runs/poems.sh'
