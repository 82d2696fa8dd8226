#!/usr/bin/env bash
# The whole chain on real Chinese reviews, about fifteen minutes on two CPU cores. Run again, it skips what is finished
# and resumes what was interrupted; remove data/demo and out/demo to start anew.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/setup.sh requirements.txt
. runs/stages.sh
began=$SECONDS

once data/demo/corpus.txt corpus python data_process.py configs/demo/data.py --parts=text
once out/demo/tokenizer/tokenizer.model tokenizer python -m tokenizer.train configs/demo/tokenizer.py
once data/demo/prompts.pkl data python data_process.py configs/demo/data.py --parts=pretrain,sft,rm,prompts
stage pretrain python pretrain.py configs/demo/pretrain.py --resume
stage sft python sft.py configs/demo/sft.py --resume
stage rm python rm_train.py configs/demo/rm.py --resume
stage dpo python dpo_train.py configs/demo/dpo.py --resume
stage ppo python ppo_train.py configs/demo/ppo.py --resume
stage grpo python grpo_train.py configs/demo/grpo.py --resume
stage quantize python quantize.py configs/demo/quantize.py --resume
once out/demo/report.md compare python eval_generate.py --data=data/demo --report=out/demo/report.md \
    --compare=out/demo/sft,out/demo/dpo,out/demo/ppo,out/demo/grpo,out/demo/quantize,out/demo/pretrain \
    --best_of=2,4,8 --reward_model=out/demo/rm --picture=out/demo/compare.png
stage report python -m common.report out/demo

printf '\nDone in %d s. Loss plots: out/demo/*/loss.png; samples: out/demo/*/samples.txt; comparison: out/demo/report.md\n' \
    $((SECONDS - began))
echo 'All of it on one page: out/demo/report.html'
echo 'Chat with it: python eval_generate.py --ckpt=out/demo/ppo, or in a browser: python web_demo.py --runs=out/demo'
