#!/bin/bash
# TensorFlow: a parameter server and three workers, the first of them the chief. sbatch examples/recipes/slurm_replicas.sh
#SBATCH --ntasks=4 --ntasks-per-node=1
#SBATCH --requeue --open-mode=append
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export PS=${hosts[0]}:2222
WORKERS=$(printf '%s:2222,' "${hosts[@]:1}")
export WORKERS=${WORKERS%,}

# --kill-on-bad-exit=0: a task that fails is started again by its launcher, and the others wait for it. When the chief's
# launcher has ended with 0, the run has finished, and the tasks that are left are ended.
# shellcheck disable=SC2016 # the tasks expand these, each its own
srun --kill-on-bad-exit=0 bash -c '
  if [ "$SLURM_PROCID" = 0 ]; then
    exec stepguard run -- python examples/replicas.py --ps "$PS" --workers "$WORKERS" --job ps
  fi
  task=$((SLURM_PROCID - 1))
  stepguard run -- python examples/replicas.py --ps "$PS" --workers "$WORKERS" --task "$task" --logdir /shared/run
  [ "$?/$task" != 0/0 ] || scancel "$SLURM_JOB_ID"'
