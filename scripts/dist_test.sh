#!/usr/bin/env bash
# Test a checkpoint on several GPUs; without a GPU, in that many processes on the CPU.
set -eu

if [ $# -lt 3 ]; then
    cat >&2 <<'USAGE'
usage: scripts/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
  e.g. scripts/dist_test.sh configs/alignshift_7slice.py work_dirs/alignshift_7slice 4

CONFIG is a file, or the name of an experiment.
CHECKPOINT is a file, or the folder of a run for its best one. The result is that of one process.
Variables: as for scripts/dist_train.sh.
USAGE
    exit 2
fi
config=$1
checkpoint=$2
gpus=$3
shift 3
[ -e "$checkpoint" ] || { echo "no checkpoint $checkpoint" >&2; exit 2; }
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$gpus" test.py "$config" "$checkpoint" "$@"
