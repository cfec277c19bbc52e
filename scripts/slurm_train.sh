#!/usr/bin/env bash
# Train on a cluster with Slurm: srun starts one process a GPU.
set -eu

if [ $# -lt 3 ]; then
    cat >&2 <<'USAGE'
usage: scripts/slurm_train.sh PARTITION JOB CONFIG [options of tools/train.py]
  e.g. GPUS=4 scripts/slurm_train.sh gpu alignshift configs/alignshift_7slice.py --amp

CONFIG is a file, or the name of an experiment.
The total batch stays that of the config: each process takes its share.
Variables: GPUS in all (8); GPUS_PER_NODE (GPUS, at most 8); CPUS_PER_TASK (5: one for training,
four for num_workers=4); SRUN_ARGS, more options of srun ("--time=2-0 --mem=64G"); MASTER_PORT (by
default made of the job's number); PYTHON, the interpreter (.venv's if there is one, else python);
OMP_NUM_THREADS (1).
USAGE
    exit 2
fi
partition=$1
job=$2
config=$3
shift 3

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -ra more <<<"${SRUN_ARGS:-}"
exec srun --partition="$partition" --job-name="$job" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" --gres="gpu:$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${more[@]+"${more[@]}"} \
    "$root/scripts/python.sh" -u "$root/tools/train.py" "$config" "$@" --launcher slurm
