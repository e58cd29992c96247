#!/bin/bash
# Requeues by itself, without `stepguard run`: the program says by its exit code that it was stopped, with
# Stopping(at="slurm", exit_codes={"stopped": 75}). It is not started again after a crash.
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
set -u

program='' asked=''
# shellcheck disable=SC2329 # The traps call it.
pass_on() {
  asked=$1
  if [ -n "$program" ]; then kill -s "$asked" "$program"; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
python train.py &
program=$!
if [ -n "$asked" ]; then kill -s "$asked" "$program"; fi
# A signal with a trap ends `wait` before the program has ended: wait again.
until wait "$program"; code=$?; ! kill -0 "$program" 2>/dev/null; do :; done
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
