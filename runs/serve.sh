#!/usr/bin/env bash
# Serve a model by llama.cpp's server (xllamacpp) to any client of OpenAI's; a checkpoint is exported to GGUF first.
# usage: bash runs/serve.sh out/demo/ppo [PORT]     or     bash runs/serve.sh out/demo/gguf/model.gguf [PORT]
# How to serve it by vLLM, Ollama or `transformers serve` is in docs/deploy.md.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?a run directory, a checkpoint or a .gguf file} port=${2:-8080}
. runs/setup.sh requirements.txt
python -m pip install --quiet --disable-pip-version-check "$(grep -o '^xllamacpp==[0-9.]*' requirements-dev.txt)"
if [ "${model%.gguf}" = "$model" ]; then
    gguf=${model%/} gguf=${gguf%.pt}-gguf # beside the run or the file
    python export.py --format=gguf --ckpt="$model" --out="$gguf" --overwrite
    model=$gguf/model.gguf
fi
exec python -m serving.llama_cpp "$model" --port="$port"
