"""What a framework must provide to be supervised, and nothing else.

The core never learns what a tensor is: it asks an :class:`Engine` for a :class:`Snapshot` of one step, gives the
snapshot back to be written, and hands over a checkpoint to be restored. Adding a framework is writing one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

SessionT = TypeVar("SessionT")
_SessionT_contra = TypeVar("_SessionT_contra", contravariant=True)


class Snapshot(Protocol):
    """The training state of exactly one step, in memory, that nothing will change any more."""

    @property
    def step(self) -> int | None:
        """The step that the state belongs to; ``None`` when the program counts no steps."""

    @property
    def nbytes(self) -> int:
        """The size of the state in memory, in bytes."""

    @property
    def written(self) -> str | None:
        """Where the state lies already, if it could not be held in memory; ``None`` if it is still to be written."""


class EventLog(Protocol):
    """Where a run writes its curves and the records of its own life. Any thread."""

    def started(self, step: int) -> None:
        """A session was prepared and its services start at ``step``."""

    def checkpointed(self, step: int | None, path: str) -> None:
        """The checkpoint at ``path`` (the prefix or directory really written) holds ``step``."""

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One value of one curve."""

    def flush(self) -> None:
        """Hand what was written so far to the system."""

    def stopped(self) -> None:
        """The run has stopped; the last record of this session."""

    def close(self) -> None:
        """Flush and close; :meth:`reopen` may follow."""

    def reopen(self) -> None:
        """Make the log writable again after :meth:`close`; nothing when it is open."""


class ValueWatch(Protocol):
    """Who looks at the numbers that a program computes. Any thread."""

    def look(self, values: Mapping[str, float], step: int | None = None) -> bool:
        """Look at numbers by their names, of ``step`` or of the session's; whether one of them is not finite."""

    def settle(self) -> None:
        """Wait until what :meth:`look` has found is dealt with; only between two steps of the calling thread."""


class Engine(Protocol[_SessionT_contra]):
    """One framework, as the core sees it.

    How a session is made is said in the words of each framework: the engine's own Supervisor gives the core a function
    that prepares one, restored or initialised.

    Threads: ``close`` is called by the thread that ran the session; everything else may be called from a service
    thread, one call of a method at a time.
    """

    name: str
    """Goes into every manifest: a checkpoint is restored by the engine that wrote it."""

    storage_error_types: tuple[type[BaseException], ...]
    """What the framework raises when the disk fails it, besides ``OSError``."""

    can_return: bool
    """Whether :meth:`return_to` puts back all that trains: not so when several processes train one model."""

    def step(self, session: _SessionT_contra) -> int | None:
        """The number of steps done, or ``None`` when the program counts none. Any thread."""

    def step_name(self) -> str:
        """What the program calls its step counter: the step-rate curve is named after it."""

    def total_steps(self, session: _SessionT_contra) -> int | None:
        """The step that the program trains to, where its session knows; for those who watch the run. Any thread."""

    def watch(self, session: _SessionT_contra, before_close: Callable[[], None]) -> None:
        """Mark the step boundaries of ``session`` from now on.

        ``before_close`` is called once, when the program itself closes the session, if that is not for an error.
        """

    def watch_values(self, session: _SessionT_contra, watch: ValueWatch) -> None:
        """Show ``watch`` every number that the program summarises, and those that its steps return, from now on.

        A thread of the training calls ``watch.settle()`` before it begins the step after one that was not finite. A
        session for which this was never called pays nothing for it.
        """

    def stop_at_boundary(self, session: _SessionT_contra, main_thread_was_told: Callable[[], bool]) -> None:
        """Have the next step raise ``StopRequested`` in place of being done. Any thread.

        Not in a main thread that was told to stop because it has asked: what it runs then is how it ends.
        """

    def call_after_steps(self, session: _SessionT_contra, steps: int, callback: Callable[[], int]) -> None:
        """Call ``callback`` at the boundary after ``steps`` more steps, in the thread that did the last of them.

        It returns the number of steps until the next call.
        """

    def progress(self, session: _SessionT_contra) -> object:
        """A value that differs from an earlier one when a run in between may have changed the saved state."""

    def is_shared(self, session: _SessionT_contra) -> bool:
        """Whether others may change the saved state as well, in ways that `progress` does not see."""

    def settle(self, session: _SessionT_contra, timeout_secs: float) -> None:
        """Wait for the last steps of others who train the same model, before the last checkpoint; often for none."""

    def at_boundary(
        self, session: _SessionT_contra, what: str, patience_secs: float | None = None
    ) -> AbstractContextManager[None]:
        """A context in which no step runs, so that the state is that of exactly one step.

        The steps that run now have as long to end as the engine sees fit, and at most ``patience_secs``.

        Raises:
            NoBoundaryError: no boundary came in time; the message names the run that is in the way of ``what``.
        """

    def snapshot(self, session: _SessionT_contra) -> Snapshot:
        """Copy the state. Called inside :meth:`at_boundary`: training waits for this, so it is fast."""

    def non_finite(self, snapshot: Snapshot) -> Sequence[str]:
        """The names of the parts of ``snapshot`` that hold NaN or infinity. Writer thread, or inside a boundary."""

    def return_to(self, session: _SessionT_contra, path: Path) -> None:
        """Put what the checkpoint at ``path`` holds back into the session that runs; inside :meth:`at_boundary`.

        The random states and the position in the data are left as they are: the same batches would do the same again.
        """

    def checkpoint_name(self, step: int | None) -> str:
        """The name of the checkpoint of ``step``, for example ``model.ckpt-1200``."""

    def write(self, snapshot: Snapshot, stage: Path, name: str) -> Mapping[str, tuple[int, str]]:
        """Write the files of ``snapshot`` into the directory ``stage``: ``name`` or ``name.*``. Writer thread.

        Returns size in bytes and digest, by name, of those that were digested while they were written (see
        ``stepguard.files.NewFile``); the store reads the others.
        """

    def kept_checkpoints(self) -> Sequence[str]:
        """The names of the checkpoints that the framework itself keeps a list of, oldest first; often none."""

    def committed(self, kept: Sequence[tuple[str, float]]) -> None:
        """A checkpoint was committed: path and Unix time of those to keep, oldest first. Writer thread."""

    def summarise(self, session: _SessionT_contra) -> None:
        """Compute the program's summaries and write them to the event log. Service thread."""

    def is_open(self, session: _SessionT_contra) -> bool:
        """Whether the session can still run; a program may have closed it before it stopped the supervisor."""

    def close(self, session: _SessionT_contra) -> None:
        """Close the session, so that the threads that it blocks return."""
