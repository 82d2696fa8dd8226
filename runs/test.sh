#!/usr/bin/env bash
# All tests. Arguments go to pytest: bash runs/test.sh tests/test_model.py -k rope
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/setup.sh requirements-dev.txt
# the browser of tests/test_web_page.py, which without one is skipped
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 || true
fi
# tests are many and small: a process a core with one thread each is faster than one process on all cores; in the order
# of their names, as xdist's own order leaves the files with one long test to the end
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -q -n $((cores < 8 ? cores : 8)) --dist loadfile --no-loadscope-reorder "$@"
