#!/bin/bash
# Trains on one node, as long as it takes: each time the job comes to its end, or is preempted, the last step is saved
# and the job goes back into the queue. Submit it once: sbatch examples/recipes/slurm.sh
#SBATCH --job-name=digits
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# The warning comes to this script (B:), two minutes before the end, for runs whose end Slurm does not tell.
#SBATCH --signal=B:USR1@120
set -euo pipefail

# `exec` puts the launcher in the place of this script. A shell that waits for its program passes no signal on.
exec stepguard run --requeue slurm -- python examples/torch/digits.py --logdir runs/digits --steps 200000
