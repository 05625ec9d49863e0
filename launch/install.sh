#!/bin/sh
# Makes the virtual environment $1 and installs the package into it. $2: an index with torch's CPU-only wheel, or empty.
set -eu
venv=$1
torch_index=${2:-}

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" && echo "$PYTHON" && return 0
        echo "PYTHON=$PYTHON is no Python 3.12 or newer" >&2
        return 1
    fi
    for name in python3.12 python3.13 python3.14 python3; do
        found=$(command -v "$name" 2>/dev/null) && suits "$found" && echo "$found" && return 0
    done
    for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        suits "$found" && echo "$found" && return 0
    done
    if command -v uv >/dev/null 2>&1; then
        found=$(uv python find '>=3.12' 2>/dev/null) && suits "$found" && echo "$found" && return 0
    fi
    return 1
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python) || {
        echo "megatron-evolve needs Python 3.12 or newer and found none: install one" \
            "(apt install python3.12 python3.12-venv, pyenv install 3.12, or uv python install 3.12)," \
            "or name one with make PYTHON=/path/to/python3.12" >&2
        exit 1
    }
    echo "making $venv with $python"
    "$python" -m venv "$venv" || {
        echo "could not make $venv: Debian and Ubuntu keep venv in a package of its own (apt install python3.12-venv)" >&2
        exit 1
    }
fi
if [ -n "$torch_index" ]; then
    "$venv/bin/python" -m pip install --quiet --index-url "$torch_index" torch
fi
echo "installing megatron-evolve and its dependencies into $venv (torch is large: a few minutes the first time)"
"$venv/bin/python" -m pip install --quiet -e .
