"""The engine contract: what a framework provides to be supervised, what it calls, and what it is given.

The core never learns what a tensor is: it asks an :class:`Engine` for a :class:`Snapshot` of one step, gives the
snapshot back to be written, and hands over a checkpoint to be restored. A framework is one folder with three classes;
``stepguard.testing`` is the smallest complete one.

**The session** is what the program gets: see :class:`Session` for its four duties.

**The engine** is an object with the methods of :class:`Engine`. What only some frameworks have is a protocol of its
own: :class:`SharedModel`, :class:`RestsBetweenLoops`, :class:`HearsOfCommits`, :class:`KeepsCheckpoints`. The core
looks once, when it is built, whether an engine has it.

**The Supervisor** is a subclass of :class:`stepguard.supervisor.Supervisor`. Its constructor builds, in this order and
each from those before it:

1. a ``stepguard.coordination.coordinator.Coordinator``. It is all that the core knows of the framework's exceptions:
   ``clean_stop_exception_types`` are those that say that the input is finished, so that the run ends well;
   ``late_noise_types`` those that are only the consequence of a stop ("cancelled"), and no error after one;
2. a ``stepguard.store.CheckpointStore`` for the logdir, with the name of the engine; ``None`` where nothing is saved;
3. the engine, from what it needs of both;
4. ``super().__init__``, with all three.

It has two methods of its own, in the words of its framework, and overrides nothing:

- ``prepare_or_wait_for_session``, which returns ``self.open_session(prepare, ...)``;
- ``managed_session``, which returns ``self.managed(open_session, ...)``.

How a run goes, and in which thread (P: the one that opens and stops the session, usually the program's main thread; T:
one that runs a step; S: a service; W: the writer)::

    P  prepare                        restored or initialised: Prepared(session, what was recovered)
    P  watch, watch_values            the session marks its steps, and shows its numbers
    P  call_after_steps               where checkpoints are taken by steps
    T  ... steps ...                  each between two boundaries; callbacks of call_after_steps
    S  step, progress, summarise      on timers
    S  at_boundary: snapshot          also T, from a callback of call_after_steps, and P at the end
    W  non_finite, write              the checkpoint is committed by the store
    P  close                          after the last checkpoint

**What the core gives** to an engine:

- ``stepguard.store``: ``CheckpointStore`` finds, proves and commits checkpoints;
- ``stepguard.files``: ``NewFile`` writes a file that is synced, and digested meanwhile;
- ``stepguard.errors``: what to raise (:class:`~stepguard.errors.NoBoundaryError`,
  :class:`~stepguard.errors.StopRequested`, :class:`~stepguard.errors.CheckpointMismatchError`,
  :class:`~stepguard.errors.CheckpointCorruptError`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

from stepguard.store import Checkpoint, Recovery


class Session(Protocol):
    """What the ``with`` block gets: the handle that runs steps and knows where the boundaries between them are.

    How a step is run is said in the words of the framework: ``run(fetches)``, a loop over ``steps(loader)``. However
    that is done, a session has four duties:

    1. **Boundaries.** While the block of :meth:`Engine.at_boundary` lasts, no step begins, in any thread; each step
       that is done is counted by :meth:`Engine.progress`, and may be what a callback of
       :meth:`Engine.call_after_steps` waits for.
    2. **Stopping.** After :meth:`Engine.stop_at_boundary` no step begins any more: the next one raises
       ``StopRequested``, or a loop that the session itself drives ends. Where a number was not finite, a thread calls
       ``watch.settle()`` (see :meth:`Engine.watch_values`) before its next step, and holds no boundary meanwhile: the
       session may be put back to an earlier step there.
    3. **A step is whole or it is not saved.** Ctrl-C may come in the middle of one. Either the session holds it back
       until the step is done, and raises KeyboardInterrupt at the boundary; or a step that was left half-way is
       remembered, and :meth:`Engine.at_boundary` raises NoBoundaryError from then on. The same for a step that was left
       by an error, unless the framework undoes it.
    4. **Closing.** ``close`` ends the session. When the program calls it itself, ``before_close`` of
       :meth:`Engine.watch` is called first.
    """

    def close(self) -> None:
        """End the session; a second call does nothing."""


SessionT = TypeVar("SessionT", bound=Session)
_SessionT_contra = TypeVar("_SessionT_contra", contravariant=True, bound=Session)


@dataclass(frozen=True, slots=True)
class Prepared(Generic[SessionT]):
    """What ``prepare`` returns: a session that can run, and what the search for a checkpoint to restore has found.

    ``recovered`` is ``None`` where this process restored nothing by itself: a worker, a run without a logdir, a model
    that lives on its servers. A search that found no checkpoint is a ``Recovery`` whose ``checkpoint`` is ``None``.
    """

    session: SessionT
    recovered: Recovery | None = None


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
        """Where the state lies already, if the framework could only write it itself; ``None`` if it is in memory."""


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
    """Looks at the numbers that a program computes. Any thread."""

    def look(self, values: Mapping[str, float], step: int | None = None) -> bool:
        """Look at numbers by their names, of ``step`` or of the session's; whether one of them is not finite."""

    def settle(self) -> None:
        """Wait until what :meth:`look` has found is dealt with; only between two steps of the calling thread."""


class Engine(Protocol[SessionT]):
    """One framework, as the core sees it. What every engine has.

    Threads: ``prepare``, ``watch``, ``watch_values`` and ``close`` are called by the thread that opens and stops the
    session; everything else may be called from a service thread, one call of a method at a time.
    """

    name: str
    """Goes into every manifest: a checkpoint is restored by the engine that wrote it."""

    storage_error_types: tuple[type[BaseException], ...]
    """What the framework raises when the disk fails it, besides ``OSError``."""

    can_return: bool
    """Whether :meth:`restore` puts back all that trains in a run: not so when several processes train one model."""

    # --- the session ---

    def prepare(self) -> Prepared[SessionT]:
        """A new session that can run: restored from the newest good checkpoint, or else initialised.

        It may have parameters with defaults, in the words of the framework, which its Supervisor binds. Which
        checkpoint is restored is not its decision: ``stepguard.saving.restoring.restore_newest(store, restore)`` finds
        it, has it restored by :meth:`restore`, warns of what was damaged, and returns what is to be returned as
        ``recovered``. Where that has no checkpoint, the session is initialised. One whose preparation fails is closed
        before the error leaves.

        Raises:
            CheckpointMismatchError: the newest good checkpoint is of another model. Nothing was changed.
            NoGoodCheckpointError: checkpoints exist, and every one is damaged.
        """

    def restore(self, session: SessionT, checkpoint: Checkpoint, *, in_run: bool = False) -> None:
        """Load ``checkpoint``, whose bytes were proven, into ``session``.

        A session that was just made goes on exactly there: with its step, its random states, its position in the data.
        With ``in_run`` the session runs already, and is put back to an earlier step inside :meth:`at_boundary`: random
        states and the position in the data are left as they are, since the same batches would do the same again.

        Raises:
            CheckpointMismatchError: it does not fit the model. Nothing was changed.
            CheckpointCorruptError: it cannot be used after all; the next older one is tried.
        """

    def is_open(self, session: SessionT) -> bool:
        """Whether the session can still run; a program may have closed it before it stopped the supervisor."""

    def close(self, session: SessionT) -> None:
        """Close the session without a call of ``before_close``, so that the threads that it blocks return."""

    # --- steps ---

    def step(self, session: SessionT) -> int | None:
        """The number of steps done, or ``None`` when the program counts none. Any thread."""

    def step_name(self) -> str:
        """What the program calls its step counter: the step-rate curve is named after it."""

    def total_steps(self, session: SessionT) -> int | None:
        """The step that the program trains to, where its session knows; for those who watch the run. Any thread."""

    def watch(self, session: SessionT, before_close: Callable[[], None]) -> None:
        """Mark the step boundaries of ``session`` from now on.

        ``before_close`` is called once, when the program itself closes the session, if that is not for an error.
        """

    def watch_values(self, session: SessionT, watch: ValueWatch) -> None:
        """Show ``watch`` every number that the program summarises, and those that its steps return, from now on.

        A thread of the training calls ``watch.settle()`` before it begins the step after one that was not finite. A
        session for which this was never called pays nothing for it.
        """

    def stop_at_boundary(self, session: SessionT, main_thread_was_told: Callable[[], bool]) -> None:
        """Have the next step raise ``StopRequested`` in place of being done. Any thread.

        Exception: a main thread for which ``main_thread_was_told()`` is true, asked anew at each step, has already seen
        ``should_stop()`` return true; it may run further steps to finish.
        """

    def call_after_steps(self, session: SessionT, steps: int, callback: Callable[[], int]) -> None:
        """Call ``callback`` at the boundary after ``steps`` more steps, in the thread that did the last of them.

        It returns the number of steps until the next call. It may come to :meth:`at_boundary` itself.
        """

    def progress(self, session: SessionT) -> object:
        """A value that differs from an earlier one when a step in between may have changed the saved state."""

    def at_boundary(
        self, session: SessionT, what: str, patience_secs: float | None = None
    ) -> AbstractContextManager[None]:
        """A context in which no step runs, so that the state is that of exactly one step. One at a time holds it.

        The steps that run now have as long to end as the engine sees fit (longer, the longer steps have been), and at
        most ``patience_secs``. Steps that begin meanwhile wait for the end of the block.

        Raises:
            NoBoundaryError: no boundary came in time, or the state is that of no step; the message names the step that
                is in the way of ``what``. Training goes on.
        """

    # --- checkpoints ---

    def snapshot(self, session: SessionT) -> Snapshot:
        """Copy the state. Called inside :meth:`at_boundary`: training waits for this, so it is fast."""

    def non_finite(self, snapshot: Snapshot) -> Sequence[str]:
        """The names of the parts of ``snapshot`` that hold NaN or infinity. Writer thread, or inside a boundary."""

    def checkpoint_name(self, step: int | None) -> str:
        """The name of the checkpoint of ``step``, for example ``model.ckpt-1200``."""

    def write(self, snapshot: Snapshot, stage: Path, name: str) -> Mapping[str, tuple[int, str]]:
        """Write the files of ``snapshot`` into the directory ``stage``: ``name`` or ``name.*``. Writer thread.

        Returns size in bytes and digest, by name, of those that were digested while they were written (see
        ``stepguard.files.NewFile``); the store reads the others.
        """

    # --- summaries ---

    def summarise(self, session: SessionT) -> None:
        """Compute the program's summaries and write them to the event log. Service thread."""


@runtime_checkable
class SharedModel(Protocol[_SessionT_contra]):
    """An engine whose model may be trained by other processes as well, in ways that ``progress`` does not see."""

    def is_shared(self, session: _SessionT_contra) -> bool:
        """Whether others may change the saved state of this session. Any thread."""

    def wait_for_others(self, session: _SessionT_contra, timeout_secs: float) -> None:
        """Wait, before the last checkpoint, for the last steps of those others, for ``timeout_secs`` at most."""


@runtime_checkable
class RestsBetweenLoops(Protocol[_SessionT_contra]):
    """An engine whose session drives the program's loops: while none runs, the state is the program's own.

    Nothing reads it then. What is saved is the copy that was kept at the end of the last loop. A loop ends by itself at
    the first boundary after a stop, so that a session is not closed under a step that takes long.
    """

    def is_resting(self, session: _SessionT_contra) -> bool:
        """Whether no loop runs since the last one has ended. Any thread."""

    def is_evaluating(self, session: _SessionT_contra) -> bool:
        """Whether the program has said that it evaluates, so that no boundary is to be expected. Any thread."""

    def is_alone(self, session: _SessionT_contra) -> bool:
        """Whether no other process has to add its part of the same step to a checkpoint."""

    def call_at_rest(self, session: _SessionT_contra, keep: Callable[[bool], None]) -> None:
        """Call ``keep(is_last)`` when a loop has ended, in its thread, before the program goes on; ``is_last`` says
        whether the run is to end there.
        """

    def defer(self, session: _SessionT_contra, callback: Callable[[], None]) -> bool:
        """Where an evaluation is inside a step: call ``callback`` at the end of that step. Whether it will be."""


@runtime_checkable
class HearsOfCommits(Protocol):
    """An engine that has something to do once a checkpoint is durable."""

    def committed(self, kept: Sequence[tuple[str, float]]) -> None:
        """A checkpoint was committed: path and Unix time of those to keep, oldest first. Writer thread."""


@runtime_checkable
class KeepsCheckpoints(HearsOfCommits, Protocol):
    """An engine whose framework keeps a list of checkpoints of its own, and removes those that drop out of it."""

    def kept_checkpoints(self) -> Sequence[str]:
        """The names of the checkpoints on that list, oldest first; empty where there is none. Writer thread."""
