#!/usr/bin/env bash
# Runs a command of tools/ in several processes, one a GPU; dist_train.sh and dist_test.sh call it.
# launch.sh GPUS COMMAND [ARGUMENTS ...], variables as in dist_train.sh.
set -eu

gpus=$1
command=$2
shift 2
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
    echo "GPUS must be a whole number of at least 1, got '$gpus'" >&2
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${NNODES:-1}" -gt 1 ]; then
    : "${NODE_RANK:?of several nodes, NODE_RANK says which this is: 0 to NNODES - 1}"
    : "${MASTER_ADDR:?of several nodes, MASTER_ADDR is the address of node 0}"
    meeting=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${PORT:-29500}")
else
    # Port 0: any that is free, so that two runs on a machine never meet.
    meeting=(--nnodes 1 --rdzv-backend c10d --rdzv-endpoint localhost:0)
fi
exec "$root/scripts/python.sh" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$gpus" \
    "$root/tools/$command" "$@" --launcher pytorch
