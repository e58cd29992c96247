#!/bin/bash
# Trains on several nodes: on each, a launcher of ours and a torchrun. Submit it once: sbatch examples/recipes/slurm_nodes.sh
#SBATCH --job-name=digits-ddp
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# To the steps of the job (no B:), that is to the launchers, two minutes before the end.
#SBATCH --signal=USR1@120
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# --kill-on-bad-exit=0: the launchers restart their programs themselves. The logdir is on a disk that all nodes share.
srun --kill-on-bad-exit=0 stepguard run --requeue slurm --first-delay-secs 30 -- torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 2 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
  examples/torch/digits_ddp.py --logdir runs/digits_ddp --steps 200000
