"""Curves of a run in Weights & Biases: ``Supervisor(..., summary_writer=WandbWriter(logdir, project="digits"))``.

All starts of a run are one run of W&B, whose id lies in the logdir. It needs `pip install wandb`.
"""

import os
import uuid
from pathlib import Path

import wandb


class WandbWriter:
    """A summary writer for one process: make it in the chief only, before its Supervisor."""

    def __init__(self, logdir, **init):
        self._run = wandb.init(id=_id_in(Path(logdir)), resume="allow", **init)
        # W&B drops values of a step that is behind it, as those of a restart are: so the step is a number of its own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add_scalar(self, tag, value, global_step=None):
        """Called by the Supervisor for each number of ``sess.summary`` and ``summaries=``."""
        self._run.log({tag: float(value), "step": global_step})

    def keep(self, committed):
        """A checkpoint as an artifact of the run: ``Saving(on_commit=writer.keep)``. For PyTorch and JAX."""
        known = {"step": committed.step, **committed.metrics}
        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata=known)
        artifact.add_dir(str(committed.path))
        # The call lasts until all is sent: so long, the checkpoint is not pruned.
        self._run.log_artifact(artifact, aliases=["latest", f"step-{committed.step}", *committed.names]).wait()

    def flush(self):
        """W&B sends in the background."""

    def close(self):
        """Called at the end of each session. A run that was killed goes on with the next start."""
        self._run.finish()


def _id_in(logdir):
    path = logdir / "wandb_id.txt"
    if not path.exists():
        logdir.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(uuid.uuid4().hex)
        # Whole, or not at all: a start that is killed here leaves no half of an id.
        os.replace(aside, path)
    return path.read_text()
