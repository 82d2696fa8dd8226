#!/usr/bin/env bash
# All tests. Arguments go to pytest: bash runs/test.sh tests/test_model.py -k rope
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/setup.sh requirements-dev.txt
python -m pytest -q "$@"
