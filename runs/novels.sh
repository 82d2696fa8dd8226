#!/usr/bin/env bash
# A model of web novels, with the same instructions and much the same preferences after them as general.sh.
# docs/recipes.md says what it takes, and which variables change it.
# usage: bash runs/novels.sh SIZE [GPUS], such as 58m 8
RECIPE=novels exec bash "$(dirname "$0")/recipe.sh" "$@"
