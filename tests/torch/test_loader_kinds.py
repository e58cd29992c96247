"""For every kind of loader: a run that is stopped and goes on has the batches of one that is not, or is refused.

The feeds are used without a session, which makes these tests fast. ``tests/soak/loader_matrix.py`` kills real programs.
"""

from __future__ import annotations

import gc
import io
import random

import numpy as np
import pytest
import torch
from loader_kinds import BATCHES, KINDS, ONE_TIME

from stepguard.errors import CheckpointMismatchError
from stepguard.torch.data.feeds import feed_of
from stepguard.torch.random_states import STREAMS

EPOCHS = 3
REFUSED = "refused"
WORKERS = {"no worker": (0, False), "two workers": (2, False), "persistent workers": (2, True)}

# The program has drawn the order, and the seeds of the workers, when it made the iterator.
MAY_BE_REFUSED = {"zip", "enumerate"}


def plain(batch):
    """A batch as something that can be compared."""
    if isinstance(batch, dict):
        return {key: plain(one) for key, one in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(one) for one in batch]
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def loaded(state):
    """What a checkpoint would give back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Run:
    """A process of a program: seeds, a loader, and a training that draws from all the streams."""

    def __init__(self, kind, workers, state=None, **options):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        if state is not None and kind in ONE_TIME:
            # A program makes its iterators in the session, where the streams are those of the checkpoint.
            STREAMS.restore(state["random"])
        self.feed = feed_of(KINDS[kind](*workers))
        if state is not None:
            self.feed.resume(state["position"], **options)
            STREAMS.restore(state["random"])
        self.batches = []

    def train(self, steps=None, epochs=EPOCHS):
        """Train ``steps`` steps, or all; returns what a checkpoint has."""
        while steps is None or len(self.batches) < steps:
            try:
                batch = self.feed.next(epochs)
            except StopIteration:
                break
            self.batches.append((plain(batch), random.random(), float(torch.rand(())), np.random.rand()))
            self.feed.consumed()
        return loaded({"position": self.feed.position(), "random": STREAMS.capture()})

    def close(self):
        self.feed.close()
        gc.collect()


def outcome(kind, workers, stops):
    """The batches of a run that was stopped after so many steps, each time in a new process; or `REFUSED`."""
    batches, state = [], None
    for stop in (*stops, None):
        run = Run(kind, workers, state)
        try:
            state = run.train(None if stop is None else stop - len(batches))
        except CheckpointMismatchError:
            return REFUSED
        finally:
            run.close()
        batches += run.batches
    return batches


def outcome_of_rests(kind, workers):
    """The batches of a run that was stopped between any two epochs, when the end of the data was seen."""
    batches, state = [], None
    for epochs in range(1, EPOCHS + 1):
        run = Run(kind, workers, state)
        state = run.train(epochs=epochs)
        run.close()
        batches += run.batches
    return batches


def whole(kind, workers):
    return outcome(kind, workers, ())


# Those whose workers are treated in ways of their own; `tests/soak/loader_matrix.py` has all of them.
WITH_WORKERS = {
    *("shuffled", "a generator", "NumPy's generator", "drawn lazily", "torchdata's with PyTorch's sampler"),
    *("a generator of the module", "a generator in a closure", "an array shuffled in place"),
    *(kind for kind in KINDS if kind.startswith("torchdata's stream")),
    *("batches read at once", "a list made when it is needed", "begun when it was made"),
    *("a stream", "a stream with a state", "a subclass", "tqdm", "Accelerate's stateful", "a mapping", "a function"),
}


def cells():
    """Every kind without workers, and some with workers that persist or do not."""
    for kind in KINDS:
        for name, workers in WORKERS.items():
            is_some = kind in ("shuffled", "a stream", "zip") if name == "two workers" else kind in WITH_WORKERS
            if not workers[0] or is_some:
                yield pytest.param(kind, workers, id=f"{kind}, {name}")


@pytest.mark.parametrize(("kind", "workers"), list(cells()))
def test_a_stopped_run_has_the_same_batches_or_is_refused(kind, workers):
    expected = whole(kind, workers)
    # In the first epoch; at the end of one; in the second, at its last batch and at its end.
    stops = (2, BATCHES, BATCHES + 3, 2 * BATCHES - 1, 2 * BATCHES) if not workers[0] else (2, BATCHES + 3)
    for one in [stops] if kind not in ONE_TIME else [(2,)]:
        found = outcome(kind, workers, one)
        assert found in (expected, REFUSED)
        assert found is not REFUSED or kind in MAY_BE_REFUSED


@pytest.mark.parametrize(("kind", "workers"), [one for one in cells() if one.values[0] not in ONE_TIME])
def test_a_run_that_is_stopped_between_epochs_has_the_same_batches(kind, workers):
    assert outcome_of_rests(kind, workers) == whole(kind, workers)


def test_a_worker_that_has_given_nothing_yet_in_a_later_epoch_begins_it():
    kind, workers = "torchdata's stream with a state", (2, True)
    stop = 2 * BATCHES + 1
    assert outcome(kind, workers, (stop,)) == whole(kind, workers)
