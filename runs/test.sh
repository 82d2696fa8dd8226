#!/usr/bin/env bash
# All tests. Arguments go to pytest: bash runs/test.sh tests/test_model.py -k rope
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/setup.sh requirements-dev.txt
# the browser of tests/test_web_page.py, which without one is skipped
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 || true
fi
python -m pytest -q "$@"
