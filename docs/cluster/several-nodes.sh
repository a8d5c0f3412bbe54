#!/usr/bin/env bash
# Several machines without a scheduler: run this on each, with the same HEAD, NODES and arguments.
#   HEAD=node0:29400 NODES=4 bash docs/cluster/several-nodes.sh \
#     train-mpl --recipe imagenet-10pct --data /shared/data --precision bf16 --run /shared/runs/imagenet
# The run directory must be one that all machines see: checkpoints are written by all of them.
set -euo pipefail

: "${HEAD:?host:port of one of the machines, reachable from all}" "${NODES:?how many machines}"
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
exec torchrun \
  --nnodes="$NODES" --nproc-per-node="$processes" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-mpl}" \
  --no-python -- mpl "$@"
