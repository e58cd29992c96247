#!/bin/bash
# The same command on each node, with the name of one of them: nodes.sh node1 2
set -euo pipefail
first_node=$1
nodes=$2

exec stepguard run --first-delay-secs 30 -- torchrun \
  --nnodes "$nodes" --nproc-per-node 2 \
  --rdzv-backend c10d --rdzv-id digits --rdzv-endpoint "$first_node:29500" \
  examples/torch/digits_ddp.py --logdir runs/digits_ddp
