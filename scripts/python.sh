#!/usr/bin/env bash
# The interpreter of the other scripts: PYTHON, else that of .venv (`make setup`), else python.
set -eu

venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    if [ -x "$venv" ]; then PYTHON=$venv; fi
fi
# One thread a process: torchrun would set it too, with a page of warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" "$@"
