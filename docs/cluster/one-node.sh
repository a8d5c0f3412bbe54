#!/usr/bin/env bash
# One machine: a process for each accelerator (or PROCESSES of them on the CPU).
#   bash docs/cluster/one-node.sh train-mpl --recipe imagenet-10pct --data DATA --precision bf16 --run runs/imagenet
set -euo pipefail

processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
# A worker that dies is started again with all others, three times; they go on from the last checkpoint.
exec torchrun --standalone --nproc-per-node="$processes" --max-restarts=3 --no-python -- mpl "$@"
