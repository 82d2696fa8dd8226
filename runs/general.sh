#!/usr/bin/env bash
# A model of encyclopedias, Zhihu and web pages, then of instructions and preferences. docs/recipes.md says what it
# takes, and which variables change it.
# usage: bash runs/general.sh SIZE [GPUS], such as 58m 8
RECIPE=general exec bash "$(dirname "$0")/recipe.sh" "$@"
