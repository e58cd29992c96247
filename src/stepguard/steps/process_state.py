"""The state that belongs to one process rather than to the model: its random streams and its positions in the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from stepguard.steps.feeds import Feed
from stepguard.steps.places import Places
from stepguard.steps.progress import OWN, STEPS, Progress
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.strangers import Strangers, warn_of
from stepguard.words import logger

_log = logger(__name__)


class ProcessState(ABC):
    """The streams and the feeds of a session. For the training thread, or a thread that holds the boundary.

    How loaders are matched with those of the earlier run is explained in :mod:`stepguard.steps.places`.
    """

    def __init__(self, streams: RandomStreams, processes: int = 1) -> None:
        self.streams = streams
        self.processes = processes
        self._places = Places(processes)
        self.strangers = Strangers()
        # The earlier run's random states, until the first step.
        self._random: dict[str, Any] | None = None
        # The random states with which the run began, until its first loop. Draws before that loop belong to the run, so
        # a start that goes on from there makes them again.
        self._first: dict[str, Any] | None = None
        # What the program has changed in the state before its first loop, in its first start.
        self._work_before: Mapping[str, Any] | None = None
        self.progress = Progress(streams)
        """Where the program is among its loops."""
        # In a loop of the program's own: whether it draws between two steps, for the next one; the states before that.
        self._draws_between: bool | None = None
        self._after_own_step: dict[str, Any] | None = None

    @abstractmethod
    def new_feed(self, loader: Any) -> Feed:
        """A feed for ``loader``.

        Raises:
            TypeError: ``loader`` cannot be iterated over.
        """

    def feed(self, loader: Any, *, resume_data: bool | str = True) -> Feed:
        """The one feed of ``loader``. A new feed begins at the position of the earlier run, as ``resume_data`` says.

        Raises:
            CheckpointMismatchError: the earlier run had another loader here.
        """
        return self._places.feed(loader, self.new_feed, resume_data)

    @property
    def epoch(self) -> int:
        """The number of complete epochs over the loader used last; before its first use, that of the restored run."""
        return self._places.epoch

    @property
    def loaders(self) -> list[Any]:
        """The loaders that ``steps`` was given and that the program still has."""
        return [feed.loader for feed in self._places.feeds]

    @property
    def batches_read_again(self) -> int:
        """The number of batches that were read again to come to the positions of the earlier run. Any thread."""
        return sum(feed.read_again for feed in self._places.feeds)

    def saved_generators(self) -> list[Any]:
        """The generators of random numbers in the state and in the position in the data."""
        return []

    def capture(self) -> dict[str, Any]:
        """The random states and positions, as plain values and arrays of the framework. Called at a boundary."""
        # Read once, because the loop may begin meanwhile.
        first = self._first
        kept = self._random or first or self._after_own_step
        drawn = self.strangers.drawn(self.saved_generators)
        progress = self.progress
        return {
            **({"drawn": drawn} if drawn else {}),
            **({} if self._work_before is None else {"work before": self._work_before}),
            "random": self.streams.capture() if kept is None else kept,
            "is_first": first is not None,
            "loaders": self._places.saved(),
            "epochs": {"done": progress.epochs_done, "loops": progress.loops_done, "begun": progress.is_epoch_begun},
            "place": {**progress.saved(), "draws between": self._draws_between},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, which :meth:`capture` has returned in an earlier process."""
        self._places.restore(state["loaders"])
        # A checkpoint of an earlier version has no epochs.
        epochs = state.get("epochs") or {"done": 0, "loops": 0, "begun": True}
        self._work_before = state.get("work before")
        place = state.get("place")
        origin = self.progress.restore(epochs, place)
        self._draws_between = None if place is None else place.get("draws between")
        if self._draws_between and self.progress.is_in_own_loop:
            _log.warning(
                "the program draws random numbers between the steps of its own loop. They go on as they were if it "
                "draws none from here to that loop; sess.steps() in place of sess.step() goes on exactly in any case"
            )
        # The streams are restored now, for draws before the first step, and again just before that step: draws in
        # between, for example to build objects that are then restored, must not move the streams. Exception: if the run
        # had not come to its first loop, these draws belong to it.
        is_first = state.get("is_first")
        self._first, self._random = (state["random"], None) if is_first else (None, state["random"])
        self.streams.restore(state["random"] if origin is None else origin)
        warn_of(state.get("drawn", []))

    def note_beginning(self) -> None:
        """Note that the run begins here, if it was not restored."""
        if self._random is None and self._first is None:
            self._first = self.streams.capture()
        self.progress.begin_run()

    def note_work_before(self, changed: list[str], rates: Mapping[str, tuple[float, float]]) -> list[str]:
        """Note that the program has changed these objects before its first loop, and ``rates`` from and to values.

        Returns those that it had not changed there in its first start, or not in the same way.
        """
        if self._work_before is None:
            self._work_before = {"objects": changed, "rates": dict(rates)}
        first, first_rates = self._work_before["objects"], self._work_before["rates"]
        new = [name for name, change in rates.items() if not _is_same_change(change, first_rates.get(name))]
        return [one for one in changed if one not in first] + [one for one in new if one.split(".")[0] in first]

    def begin_loop(self, number: int | None) -> bool:
        """Begin a loop, before its first step. Returns whether it is the one that was interrupted."""
        self._first = self._after_own_step = None
        return self.progress.begin_loop(number, STEPS)

    def begin_own_step(self) -> None:
        """Begin a step in a loop of the program's own."""
        self._first = None
        self.note_first_step()
        if self.progress.is_there:
            self.progress.begin_loop(None, OWN)
        else:
            self.progress.begin_step(None, OWN)
        if self._draws_between is None and self._after_own_step is not None:
            self._draws_between = not self.streams.are_equal(self.streams.capture(), self._after_own_step)
        self._after_own_step = None

    def end_own_step(self) -> None:
        """End a step in a loop of the program's own."""
        if self._draws_between is not False:
            self._after_own_step = self.streams.capture()

    def streams_preserved(self) -> AbstractContextManager[None]:
        """A block after which the random streams are as they were before, whatever it draws."""
        return self.streams.preserved()

    def begin_step(self) -> None:
        """Begin a step. The first step after a restore draws the same numbers as it would have drawn without one."""
        # A loop may turn out to be at its end; only a batch shows that the first step has begun.
        if self._random is not None and not (self._draws_between and self.progress.is_in_own_loop):
            self.streams.restore(self._random)

    def note_first_step(self) -> None:
        """Note that the first step has begun: draws from here on belong to the resumed run."""
        self._random = None

    def resume_streams(self) -> None:
        """Restore the streams once more: draws from here on belong to the resumed run, not to the building of it."""
        if self._random is not None:
            self.streams.restore(self._random)
            self._random = None

    def adopt_epochs(self) -> None:
        """Count epochs from now on. If the run was saved without a count, take the epochs of its loader."""
        progress = self.progress
        if not progress.epochs_done and not progress.loops_done and self.epoch:
            progress.epochs_done = self.epoch
            _log.info("epochs: going on in epoch %d, which is that of the loader", self.epoch)

    def begin_epoch(self) -> bool:
        """Begin the body of the next epoch, or begin it again. Returns whether the run was interrupted before it."""
        self._places.begin_body(self.progress.epochs_done)
        # A body that is begun again repeats the draws before its first step, which must not move the streams.
        if not self.progress.is_epoch_begun:
            self.resume_streams()
        return self.progress.begin_body()

    def leave_epoch(self) -> None:
        """Note that no body runs."""
        self._places.end_body()

    def close(self) -> None:
        """End the workers of the loaders."""
        self._places.close()


def describe_positions(state: Mapping[str, Any]) -> str:
    """The positions from which a run continues in its data, for the log."""
    return "; ".join(f"epoch {one['epoch']}, batch {one['batches']}" for one in state["loaders"]) or "no loader yet"


def _is_same_change(change: Sequence[float], first: Sequence[float] | None) -> bool:
    """Whether both set the same value, or multiply by the same."""
    if first is None:
        return False
    return change[1] == first[1] or change[1] * first[0] == first[1] * change[0]
