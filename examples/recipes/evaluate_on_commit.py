"""An evaluation of each checkpoint: ``Saving(on_commit=evaluation("python", "evaluate.py"))``.

The program gets ``--checkpoint PATH --step STEP``. With Slurm it is a job of its own: ``evaluation("sbatch", "--wait",
"evaluate.sh")``.
"""

import subprocess


def evaluation(*command):
    """A function for ``on_commit``. While it waits for the program, the checkpoint is not pruned."""

    def evaluate(committed):
        arguments = ["--checkpoint", str(committed.path), "--step", str(committed.step)]
        # A program that fails is a warning in the ledger; the run goes on.
        subprocess.run([*command, *arguments], check=True)

    return evaluate
