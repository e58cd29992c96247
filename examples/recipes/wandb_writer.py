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
