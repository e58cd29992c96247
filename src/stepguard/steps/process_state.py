"""The state that belongs to one process rather than to the model: its random streams and its positions in the data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from stepguard.steps.feeds import Feed
from stepguard.steps.own_loop import OwnLoop
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

    LIVE: ClassVar[tuple[str, ...]] = ("drawn", "random", "is_first", "loaders", "epochs", "place")
    """The keys of what the program moves; a subclass adds those of its own."""
    saves_copies = True

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
        # What is saved until the first step begins, whatever the program does beside the saving thread.
        self._beginning: Mapping[str, Any] | None = None
        # What the program has changed in the state before its first loop, in its first start.
        self._work_before: Mapping[str, Any] | None = None
        self.progress = Progress(streams)
        """Where the program is among its loops."""
        self.own = OwnLoop(streams, self.progress, self)
        """What the program does between the steps of a loop of its own."""

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
        beginning = self._beginning
        found = self._live() if beginning is None else dict(beginning)
        return found if self._work_before is None else {**found, "work before": self._work_before}

    def _live(self) -> dict[str, Any]:
        first = self._first
        kept = self._random or first
        drawn = self.strangers.drawn(self.saved_generators)
        progress = self.progress
        return {
            **({"drawn": drawn} if drawn else {}),
            "random": self.streams.capture() if kept is None else kept,
            "is_first": first is not None,
            "loaders": self._places.saved(),
            "epochs": {"done": progress.epochs_done, "loops": progress.loops_done, "begun": progress.is_epoch_begun},
            "place": {**progress.saved(), "draws between": self.own.draws_between, "own": self.own.saved()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, which :meth:`capture` has returned in an earlier process."""
        self._beginning = {key: state[key] for key in self.LIVE if key in state}
        self._places.restore(state["loaders"])
        # A checkpoint of an earlier version has no epochs.
        epochs = state.get("epochs") or {"done": 0, "loops": 0, "begun": True}
        self._work_before = state.get("work before")
        place = state.get("place")
        origin = self.progress.restore(epochs, place)
        # The streams are restored now, for draws before the first step, and again just before that step: draws in
        # between, for example to build objects that are then restored, must not move the streams. Exception: if the run
        # had not come to its first loop, these draws belong to it.
        is_first = state.get("is_first")
        self._first, self._random = (state["random"], None) if is_first else (None, state["random"])
        self.streams.restore(self.own.restore(place or {}, state["random"], origin))
        warn_of(state.get("drawn", []))

    def note_beginning(self) -> None:
        """Note that the run begins here, if it was not restored."""
        if self._random is None and self._first is None:
            self._first = self.streams.capture()
        self.progress.begin_run()
        if self._beginning is None:
            self._beginning = self._live()

    def leave_beginning(self) -> None:
        """Save, from now on, what there is: a step begins, or a loop has ended. Called inside the boundary."""
        self._beginning = None

    def note_work_before(
        self, changed: list[str], rates: Mapping[str, tuple[float, float]], begun: Mapping[str, float]
    ) -> list[str]:
        """Note that the program has changed these objects before its first loop, and ``rates`` from and to values.

        ``begun`` has all rates with which the program begins.

        Returns those that it had not changed there in its first start, or not in the same way.
        """
        if self._work_before is None:
            self._work_before = {"objects": changed, "rates": dict(rates), "begun": dict(begun)}
        first, first_rates = self._work_before["objects"], self._work_before["rates"]
        new = [name for name, change in rates.items() if not _is_same_change(change, first_rates.get(name))]
        if self.progress.is_in_own_loop:
            # What it does between two loops of its own, it has done on the way to here.
            made = {
                name: (rate, rates[name][0])
                for name, rate in self._work_before.get("begun", {}).items()
                if name in rates
            }
            new = [name for name in new if not _is_same_change(rates[name], made.get(name))]
            changed = [one for one in changed if not _has(rates, one) or _has(new, one)]
        return [one for one in changed if one not in first] + [one for one in new if one.split(".")[0] in first]

    def begin_loop(self, number: int | None) -> bool:
        """Begin a loop, before its first step. Returns whether it is the one that was interrupted."""
        self._first = None
        self.own.leave()
        return self.progress.begin_loop(number, STEPS)

    def come_to_own_loop(self) -> None:
        """Note that the program comes to a loop, perhaps of its own."""
        self.own.begin_loop(self._first)

    def copies_of(self, names: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002 - for subclasses
        """A hook for a subclass: see `stepguard.steps.own_loop.Givers`."""
        return {}

    def digest_of(self, value: Any) -> Any:
        """A hook for a subclass: see `stepguard.steps.own_loop.Givers`."""
        return value

    def begin_own_step(self) -> None:
        """Begin a step in a loop of the program's own."""
        self.own.begin_step(self._first)
        self._first = None
        self.note_first_step()
        if self.progress.is_there:
            self.progress.begin_loop(None, OWN)
        else:
            self.progress.begin_step(None, OWN)

    def end_own_step(self, *, is_due: bool) -> None:
        """End a step in a loop of the program's own; ``is_due`` says that a save is due before the next one."""
        self.own.end_step((self._work_before or {}).get("objects", ()), is_due=is_due)

    def streams_preserved(self) -> AbstractContextManager[None]:
        """A block after which the random streams are as they were before, whatever it draws."""
        return self.streams.preserved()

    def begin_step(self) -> None:
        """Begin a step. The first step after a restore draws the same numbers as it would have drawn without one."""
        self._beginning = None
        if self.strangers.is_young:
            self.strangers.note_step()
        # A loop may turn out to be at its end; only a batch shows that the first step has begun.
        if self._random is not None and self.own.goes_on_from(self._random):
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
        if not self.progress.is_epoch_begun and not self.own.goes_on_at_step:
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


def _has(rates: Collection[str], one: str) -> bool:
    return any(name.partition(".")[0].partition("[")[0] == one for name in rates)


def _is_same_change(change: Sequence[float], first: Sequence[float] | None) -> bool:
    """Whether both set the same value, or multiply by the same."""
    if first is None:
        return False
    return change[1] == first[1] or math.isclose(change[1] * first[0], first[1] * change[0], rel_tol=1e-9)
