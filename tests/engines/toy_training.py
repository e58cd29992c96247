"""A training program on the NumPy engine, run as a process: ``toy_training.py LOGDIR WEIGHTS STEPS``.

Everything that a resumed run can get wrong is in its weights: dropout from NumPy's global generator, noise and the
order of the batches from a generator of its own, and an epoch that does not end where a checkpoint is taken. Inside
each step it prints the step and reads a line, so that a test decides how far it comes; at the end of its input it runs
freely.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from numpy_engine import Model, NumPySupervisor

SEED = 7
Batch = tuple[np.ndarray, np.ndarray]


class ShuffledBatches:
    """Batches of 16 in a new order each epoch."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, order: np.random.Generator) -> None:
        self._inputs, self._targets, self._order = inputs, targets, order

    def __iter__(self) -> Iterator[Batch]:
        order = self._order.permutation(len(self._inputs))
        for first in range(0, len(order), 16):
            chosen = order[first : first + 16]
            yield self._inputs[chosen], self._targets[chosen]


def train(model: Model, inputs: np.ndarray, targets: np.ndarray) -> float:
    """One step of SGD on a perceptron with one hidden layer; the mean squared error."""
    hidden, out = model.arrays["hidden"], model.arrays["out"]
    kept = np.random.random((1, hidden.shape[1])) > 0.3
    activations = np.maximum(inputs @ hidden, 0) * kept
    errors = activations @ out - targets
    slope = 2 * errors / len(targets)
    hidden_gradient = inputs.T @ ((slope @ out.T) * (activations > 0))
    out -= 0.01 * activations.T @ slope
    hidden -= 0.01 * hidden_gradient + 1e-4 * model.noise.normal(size=hidden.shape)
    return float((errors**2).mean())


def main(logdir: str, weights: str, steps: int) -> None:
    np.random.seed(SEED)
    fixed = np.random.default_rng(SEED)
    inputs = fixed.normal(size=(200, 8))
    targets = np.tanh(inputs @ fixed.normal(size=(8, 1)))
    model = Model(
        {"hidden": fixed.normal(size=(8, 16)), "out": fixed.normal(size=(16, 1))}, np.random.default_rng(SEED)
    )
    loader = ShuffledBatches(inputs, targets, model.noise)
    # The summaries draw numbers too, at moments that no two runs share.
    supervisor = NumPySupervisor(
        model,
        logdir or None,
        save_model_steps=10,
        save_model_secs=0,
        save_summaries_secs=0.05,
        summaries=lambda: {"probe": np.random.random() + model.noise.random()},
    )
    with supervisor.managed_session() as session:
        for batch in session.steps(loader, max_steps=steps):
            print(session.global_step, flush=True)
            sys.stdin.readline()
            session.summary({"loss": train(model, *batch)})
    np.savez(weights, **model.arrays)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
