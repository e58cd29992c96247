"""Curves of a run in MLflow: ``Supervisor(..., summary_writer=MLflowWriter(logdir, experiment="digits"))``.

All starts of a run are one run of MLflow, whose id lies in the logdir. It needs `pip install mlflow`, or mlflow-skinny.
"""

import os
from pathlib import Path

import mlflow


class MLflowWriter:
    """A summary writer for one process: make it in the chief only, before its Supervisor."""

    def __init__(self, logdir, experiment="Default"):
        self._client = mlflow.MlflowClient()
        self._run_id = self._id_in(Path(logdir), experiment)

    def add_scalar(self, tag, value, global_step=None):
        """Called by the Supervisor for each number. MLflow keeps both values of a step that is done again."""
        self._client.log_metric(self._run_id, tag, float(value), step=global_step or 0)

    def keep(self, committed):
        """A checkpoint as artifacts of the run: ``Saving(on_commit=writer.keep)``. For PyTorch and JAX."""
        self._client.log_artifacts(self._run_id, str(committed.path), f"checkpoints/{committed.path.name}")

    def flush(self):
        """Nothing is kept back."""

    def close(self):
        """Called at the end of each session."""
        self._client.set_terminated(self._run_id)

    def _id_in(self, logdir, experiment):
        path = logdir / "mlflow_id.txt"
        if path.exists():
            run_id = path.read_text()
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        logdir.mkdir(parents=True, exist_ok=True)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        aside = path.with_suffix(".tmp")
        aside.write_text(self._client.create_run(experiment_id).info.run_id)
        # Whole, or not at all: a start that is killed here leaves no half of an id.
        os.replace(aside, path)
        return path.read_text()
