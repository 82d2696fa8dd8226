# Sourced by the other scripts: the active virtual environment if there is one, else .venv, with the requirements in.
# usage: . runs/setup.sh requirements.txt
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -f .venv/bin/activate ] || python3 -m venv .venv # the last thing that it writes
    . .venv/bin/activate
    to_activate=' (after . .venv/bin/activate)' # what a script adds to the commands that it names at its end
fi
python -m pip install --quiet --disable-pip-version-check -r "$1"
cores=$(nproc 2> /dev/null || sysctl -n hw.ncpu) # macOS has no nproc
