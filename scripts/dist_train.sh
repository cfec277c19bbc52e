#!/usr/bin/env bash
# Train on several GPUs of one machine or several; without a GPU, in that many processes on the CPU.
set -eu

if [ $# -lt 2 ]; then
    cat >&2 <<'USAGE'
usage: scripts/dist_train.sh CONFIG GPUS [options of tools/train.py]
  e.g. scripts/dist_train.sh configs/alignshift_7slice.py 4 --amp

CONFIG is a file, or the name of an experiment.
The total batch stays that of the config: each process takes its share.
Variables: PYTHON, the interpreter (.venv's if there is one, else python); OMP_NUM_THREADS (1).
Several machines: start it on each with NNODES, NODE_RANK (0 ... NNODES - 1), MASTER_ADDR (of node
0) and, if 29500 is taken there, PORT; GPUS is then the number on each machine.
USAGE
    exit 2
fi
config=$1
gpus=$2
shift 2
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$gpus" train.py "$config" "$@"
