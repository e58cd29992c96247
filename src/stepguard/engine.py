"""The engine contract: what a framework must provide to be supervised, what it calls, and what the core gives it.

The core never learns what a tensor is: it asks an :class:`Engine` for a :class:`Snapshot` of one step, has the engine
write the snapshot, and has it restore a checkpoint. A framework is one folder with three classes;
``stepguard.testing`` is the smallest complete one.

**The session** is the handle that the program gets: see :class:`Session` for its four duties.

**The engine** is an object with the methods of :class:`Engine`. Abilities that only some frameworks have are protocols
of their own: :class:`SharedModel`, :class:`RestsBetweenLoops`, :class:`KeepsOnRequest`, :class:`TracesSteps`,
:class:`HearsOfCommits`, :class:`KeepsCheckpoints`. The core checks once, when it is built, which of them an engine
implements.

**The Supervisor** is a subclass of :class:`stepguard.supervisor.Supervisor`. Its constructor builds, in this order and
each from those before it:

1. a ``stepguard.coordination.coordinator.Coordinator``. It holds all that the core knows of the framework's
   exceptions: ``clean_stop_exception_types`` mean that the input is finished, so that the run ends without an error;
   ``late_noise_types`` are only the consequence of a stop ("cancelled"), and no error after one;
2. a ``stepguard.store.CheckpointStore`` for the logdir, with the name of the engine; ``None`` if nothing is saved;
3. the engine, from the parts of both that it needs;
4. ``super().__init__``, with all three.

It has two methods of its own, in the terms of its framework, and overrides nothing:

- ``prepare_or_wait_for_session``, which returns ``self.open_session(prepare, start_standard_services)``;
- ``managed_session``, which returns ``self.managed(open_session, close_summary_writer=...)``.

The calls of a run, in order, with their threads (P: the thread that opens and stops the session, usually the main
thread; T: a thread that runs a step; S: a service; W: the writer; any: also that of a signal or of the NaN guard)::

    P    prepare                      restored or initialised: Prepared(session, what was recovered)
    P    watch, watch_values          the session marks its steps, and shows its numbers
    P    call_after_steps             where checkpoints are taken by steps
    T    ... steps ...                each between two boundaries; callbacks of call_after_steps
    S    step, progress, steps_done, summarise    on timers
    S    at_boundary: snapshot        also T, from a callback of call_after_steps, and P at the end
    W    non_finite, write            the checkpoint is committed by the store
    any  stop_at_boundary             after SIGTERM, or when a number was not finite
    any  at_boundary: restore         where the NaN guard puts the session back
    P    close                        after the last checkpoint

**What the core gives** to every engine:

- ``stepguard.store``: ``CheckpointStore`` finds, proves and commits checkpoints. Its constructor takes the options of
  ``Saving`` that say which are kept: ``max_to_keep``, ``keep_every_n_hours``, ``keep_best``;
- ``stepguard.saving.restoring``: ``restore_newest(store, restore, options.restoring)`` searches for the checkpoint to
  continue from. It quarantines damaged checkpoints, refuses those of another engine, and warns once of what was lost;
- ``stepguard.disk.new_file``: ``NewFile(path)`` is a context manager that digests what ``write(bytes)`` appends;
  ``size`` and ``digest`` follow. It has no ``read`` and no ``seek``. The store syncs every file, whoever wrote it;
- ``stepguard.options``: ``Options.of`` merges the options of a Supervisor, ``each_option_once`` decorates its
  constructor;
- ``stepguard.errors``: the errors to raise.

For a framework whose program is a loop over batches, ``stepguard.steps`` provides the rest:

- ``session.Session`` does all four duties. The program runs ``for batch in sess.steps(loader, max_steps=...)``, or
  ``with sess.step()``; ``sess.summary(values)`` hands a mapping to the engine's writer. Its constructor takes the
  coordinator, that writer, ``write(values, step)``, and a ``ProcessState``. The writer returns the numbers as floats if
  it has read them, else ``None``. After a block of ``sess.step()``, and after
  a loop, the program may lend the model to other work: a save waits for the next step, or gets the state of the end of
  the loop (:class:`RestsBetweenLoops`);
- ``process_state.ProcessState(streams)`` holds the state of the process: the random streams, and the position in each
  loader. A subclass defines in ``new_feed(loader)`` how a loader is read: ``feeds.IterableFeed(loader, self.streams)``
  reads any iterable. To find the next batch again, it restores the streams of the epoch's beginning and reads the
  epoch from there, so ``streams`` must include every generator that a loader draws from;
- ``random_streams.RandomStreams()`` holds Python's and NumPy's global generators. A subclass adds others: its
  ``capture()`` adds entries to the dictionary of ``super()``, and its ``restore(states)`` calls ``super()`` too. An
  iterable draws from streams of its own, so that a resumed run can read it again: ``draw_seeds()`` and
  ``reseed(seeds, name)`` of the subclass make new ones of its generators; without these they begin as copies;
- a snapshot takes ``session.process_state.capture()``: plain values, if the streams' are, of which tuples may come back
  as lists. ``restore`` gives them to ``session.restore_process_state(values, step)``, which also sets the step;
  with ``in_run`` it sets ``session.global_step = step`` instead;
- ``engine.LoopEngine`` implements an engine's methods about steps; it lacks ``name``, ``prepare``, ``restore``,
  ``watch_values``, ``snapshot``, ``non_finite``, ``checkpoint_name``, ``write`` and ``summarise``. ``prepare`` ends
  with ``session.hold_interrupts()``: from then on, Ctrl-C waits for the end of a step. ``watch_values`` keeps the
  watch, so that the engine's writer can call ``watch.look(values, step)``, and calls ``session.watch_values(watch)``,
  so that the session settles;
- ``boundary.Boundary`` and ``interrupts.InterruptHold`` implement the first three duties alone, for a session of
  another form, such as the fake's;
- ``gate``, ``chief`` and ``worker`` serve several processes that train one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

from stepguard.store import Checkpoint, Recovery


class Session(Protocol):
    """The handle that the ``with`` block gets. It runs steps and knows the boundaries between them.

    Each framework runs a step in its own terms: ``run(fetches)``, or a loop over ``steps(loader)``. In any form, a
    session has four duties:

    1. **Boundaries.** No step begins, in any thread, inside the block of :meth:`Engine.at_boundary`. Each finished step
       changes the value of :meth:`Engine.progress`, and counts for the callbacks of :meth:`Engine.call_after_steps`.
    2. **Stopping.** No step begins after :meth:`Engine.stop_at_boundary`: the next one raises ``StopRequested``, or a
       loop that the session itself drives ends. After a number that was not finite, a thread calls ``watch.settle()``
       (see :meth:`Engine.watch_values`) before its next step, without holding a boundary: the session may be put back
       to an earlier step meanwhile.
    3. **A step is whole or it is not saved.** Ctrl-C may come in the middle of a step. Either the session holds Ctrl-C
       back until the step is done, and raises KeyboardInterrupt at the boundary; or the session remembers the torn
       step, and :meth:`Engine.at_boundary` raises NoBoundaryError from then on. The same rule holds for a step that an
       error ended, unless the framework undoes the step.
    4. **Closing.** ``close`` ends the session. When the program itself calls it, the session first calls
       ``before_close`` of :meth:`Engine.watch`.
    """

    def close(self) -> None:
        """End the session; a second call does nothing."""


SessionT = TypeVar("SessionT", bound=Session)
_SessionT_contra = TypeVar("_SessionT_contra", contravariant=True, bound=Session)


@dataclass(frozen=True, slots=True)
class Prepared(Generic[SessionT]):
    """The result of ``prepare``: a session that can run, and the result of the search for a checkpoint.

    ``recovered`` is ``None`` if this process did not search: in a worker, without a logdir, or when the model still
    lives on its servers. A search that found no checkpoint is a ``Recovery`` whose ``checkpoint`` is ``None``.
    """

    session: SessionT
    recovered: Recovery | None = None


class Snapshot(Protocol):
    """The training state of exactly one step, in memory. Nothing changes it after it was taken."""

    @property
    def step(self) -> int | None:
        """The step that the state belongs to; ``None`` when the program counts no steps."""

    @property
    def nbytes(self) -> int:
        """The size of the state in memory, in bytes."""

    @property
    def written(self) -> str | None:
        """The path of a state that the framework had to write itself; ``None`` for a state in memory."""


@runtime_checkable
class PartlyUnchanging(Protocol):
    """A snapshot of which an engine writes a part that no step changes to files of its own.

    The checkpoint before has the same files, which are shared and take no room.
    """

    @property
    def unchanging_nbytes(self) -> int:
        """The size of that part in memory, in bytes."""


class EventLog(Protocol):
    """Where a run writes its curves and the records of its own life. Any thread."""

    def started(self, step: int) -> None:
        """Record that the services of a new session start at ``step``."""

    def checkpointed(self, step: int | None, path: str) -> None:
        """Record that the checkpoint at ``path`` (the prefix or directory actually written) holds ``step``."""

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one value of one curve."""

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""

    def stopped(self) -> None:
        """Record that the run has stopped: the last record of this session."""

    def close(self) -> None:
        """Flush and close; :meth:`reopen` may follow."""

    def reopen(self) -> None:
        """Make the log writable again after :meth:`close`; do nothing if it is open."""


class ValueWatch(Protocol):
    """Looks at the numbers that a program computes. Any thread."""

    def look(self, values: Mapping[str, float], step: int | None = None) -> bool:
        """Return whether one of the named numbers is not finite. ``step`` defaults to the step of the session."""

    def settle(self) -> None:
        """Wait until the guard has dealt with what :meth:`look` found. Only between two steps of the calling thread."""


class StepTrace(Protocol):
    """Is told what each step is, so that steps that are done again can be compared. Any thread, and fast.

    ``step`` is the number of steps that were done before, ``epochs`` that of complete epochs. ``is_inside`` is false
    for what the program reports between two steps, before the step of that number.
    """

    wants_digests: bool
    """Whether the session is to call :meth:`digests` and :meth:`settings` as well."""

    def numbers(self, step: int, epochs: int, values: Mapping[str, float], is_inside: bool = True) -> None:
        """Numbers that the program has reported, by name."""

    def digests(self, step: int, epochs: int, values: Mapping[str, int], *, source: str = "") -> None:
        """Digests of 64 bits, taken at the beginning of a step: ``random``, one for each part of the batch
        (``batch[0]``), and at times one for each part of the state (``state model``). ``source`` names the loader.
        """

    def settings(self, step: int, epochs: int, values: Mapping[str, float]) -> None:
        """The hyperparameters in force from this step on, all of them."""

    def saved(self, step: int, checkpoint_step: int) -> None:
        """A checkpoint of ``checkpoint_step`` was taken before ``step``. Only for an engine that counts something else
        than the step of its checkpoints; such an engine begins at that of the restored checkpoint.
        """


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a session begins, or continues: steps done, complete epochs, and the processes that train together."""

    step: int
    epochs: int = 0
    processes: int = 1


@dataclass(frozen=True, slots=True)
class StepsDone:
    """How far a session has come, so that the time of its steps can be measured.

    Args:
        number: the steps done in this session, in all of its threads. It never falls.
        ended_at: when the last of them ended, in seconds of the monotonic clock; 0 before the first.
        pauses: a number that rises when the program begins or ends something between its steps that is no training: the
            time between two loops, an evaluation that it has announced.
    """

    number: int
    ended_at: float
    pauses: int = 0


class Engine(Protocol[SessionT]):
    """One framework, as the core sees it: the attributes and methods that every engine has.

    Threads: ``prepare``, ``watch``, ``watch_values`` and ``close`` are called by the thread that opens and stops the
    session; everything else may be called from a service thread, one call of a method at a time.
    """

    name: str
    """The name in every manifest: only the engine that wrote a checkpoint restores it."""

    storage_error_types: tuple[type[BaseException], ...]
    """The errors, besides ``OSError``, that the framework raises when the disk fails."""

    can_return: bool
    """Whether :meth:`restore` puts back the whole model of a running run: false if several processes train it."""

    # --- the session ---

    def prepare(self) -> Prepared[SessionT]:
        """Return a new session that can run: restored from the newest good checkpoint, or else initialised.

        The method may have parameters with defaults, in the terms of the framework; the Supervisor binds them. The
        method does not choose the checkpoint: ``stepguard.saving.restoring.restore_newest`` finds it, restores it by
        :meth:`restore`, warns of damaged ones, and returns the value for ``recovered``. If that holds no checkpoint,
        initialise the session. If the preparation fails, close the session before the error leaves.

        Raises:
            CheckpointMismatchError: the newest good checkpoint belongs to another model. Nothing was changed.
            NoGoodCheckpointError: checkpoints exist, and every one is damaged.
        """

    def restore(self, session: SessionT, checkpoint: Checkpoint, *, in_run: bool = False) -> None:
        """Load ``checkpoint``, whose bytes were verified, into ``session``.

        A new session continues exactly at the checkpoint: with its step, its random states, its position in the data.
        With ``in_run`` the session is running, and is put back to an earlier step inside :meth:`at_boundary`. Random
        states and the position in the data then stay as they are, because the same batches would fail the same way.

        Raises:
            CheckpointMismatchError: the checkpoint does not fit the model. Nothing was changed.
            CheckpointCorruptError: the checkpoint is unusable after all; the next older one is tried.
        """

    def is_open(self, session: SessionT) -> bool:
        """Whether the session can still run: a program may close it before it stops the supervisor."""

    def close(self, session: SessionT) -> None:
        """Close the session without calling ``before_close``, so that threads blocked in it return."""

    # --- steps ---

    def step(self, session: SessionT) -> int | None:
        """The number of steps done, or ``None`` when the program counts none. Any thread."""

    def step_name(self) -> str:
        """The program's name for its step counter; the step-rate curve is named after it."""

    def total_steps(self, session: SessionT) -> int | None:
        """The step that the program trains to, if the session knows it, for progress displays. Any thread."""

    def watch(self, session: SessionT, before_close: Callable[[], None]) -> None:
        """Mark the step boundaries of ``session`` from now on.

        Call ``before_close`` once, when the program itself closes the session, unless an error made it do so.
        """

    def watch_values(self, session: SessionT, watch: ValueWatch) -> None:
        """From now on, show ``watch`` every number that the program summarises or that its steps return.

        After a step with a number that was not finite, the training thread calls ``watch.settle()`` before it begins
        the next step. A session without a watch must not pay for this.
        """

    def stop_at_boundary(self, session: SessionT, main_thread_was_told: Callable[[], bool]) -> None:
        """Make the next step raise ``StopRequested`` instead of running. Any thread.

        Exception: a main thread for which ``main_thread_was_told()`` is true, asked anew at each step, has already seen
        ``should_stop()`` return true; it may run further steps to finish.
        """

    def end_at(self, session: SessionT, step: int, ask_stop: Callable[[], None]) -> None:
        """Call ``ask_stop()`` at the boundary after ``step``, so that no later step begins. Before the first step.

        ``ask_stop`` sets the stop flag and calls :meth:`stop_at_boundary`; any thread may call it, and more than once.
        Several processes end after the same step.
        """

    def call_after_steps(self, session: SessionT, steps: int, callback: Callable[[], int]) -> None:
        """Call ``callback`` at the boundary after ``steps`` more steps, in the thread that did the last of them.

        The callback returns the number of steps until its next call. It may enter :meth:`at_boundary` itself.
        """

    def progress(self, session: SessionT) -> object:
        """A value that changes with every step that may have changed the state to save."""

    def steps_done(self, session: SessionT) -> StepsDone | None:
        """The steps that this process has done, and when the last of them ended; ``None`` if the session cannot tell.

        Any thread, several times a second, so it must be fast. Number and time belong together.
        """

    def at_boundary(
        self, session: SessionT, what: str, patience_secs: float | None = None
    ) -> AbstractContextManager[None]:
        """A context in which no step runs, so that the state belongs to exactly one step. One caller at a time has it.

        Running steps may take as long to end as the engine allows (the longer steps have been, the longer it waits),
        but at most ``patience_secs``. Steps that begin meanwhile wait for the end of the block.

        Raises:
            NoBoundaryError: no boundary came in time, or the state belongs to no step; the message names the step that
                prevents ``what``. Training goes on.
        """

    # --- checkpoints ---

    def snapshot(self, session: SessionT) -> Snapshot:
        """Copy the state. Called inside :meth:`at_boundary`: training waits for the copy, so it must be fast."""

    def non_finite(self, snapshot: Snapshot) -> Sequence[str]:
        """The names of the parts of ``snapshot`` that hold NaN or infinity. Writer thread, or inside a boundary."""

    def checkpoint_name(self, step: int | None) -> str:
        """The name of the checkpoint of ``step``, for example ``model.ckpt-1200``."""

    def write(self, snapshot: Snapshot, stage: Path, name: str) -> Mapping[str, tuple[int, str]]:
        """Write the files of ``snapshot``, named ``name`` or ``name.*``, into the directory ``stage``. Writer thread.

        Returns a mapping from file name to size in bytes and digest for the files that were digested while they were
        written (see ``stepguard.disk.new_file.NewFile``); the store reads and digests the others.
        """

    # --- summaries ---

    def summarise(self, session: SessionT) -> None:
        """Compute the program's summaries and write them to the event log. Service thread.

        Training may be in a step: what reads the model does so inside :meth:`at_boundary`. It leaves the random streams
        as they were (``with streams.preserved()``), or a resumed run would draw other numbers.
        """


@runtime_checkable
class SharedModel(Protocol[_SessionT_contra]):
    """An engine whose model other processes may train as well, with steps that ``progress`` does not count."""

    def is_shared(self, session: _SessionT_contra) -> bool:
        """Whether other processes may change the state of this session. Any thread."""

    def wait_for_others(self, session: _SessionT_contra, timeout_secs: float, *, may_go_on: bool) -> None:
        """Before the last checkpoint, wait ``timeout_secs`` at most for the last steps of the other processes.

        ``may_go_on`` says that the others may go on: wait only as long as the steps take that they are doing now.
        """


@runtime_checkable
class MakesRoom(Protocol[_SessionT_contra]):
    """An engine that can make the memory for its snapshots before it takes one."""

    def make_room(self, session: _SessionT_contra) -> None:
        """Make that memory, so that the first snapshot is as fast as the later ones. Before the first step."""


@runtime_checkable
class RestsBetweenLoops(Protocol[_SessionT_contra]):
    """An engine whose session drives the program's loops. While no loop runs, the state belongs to the program.

    Nothing reads the state then: a save uses the copy that was kept at the end of the last loop. A loop ends at the
    first boundary after a stop request, so the session need not be closed during a long step.
    """

    def is_resting(self, session: _SessionT_contra) -> bool:
        """Whether a loop has ended and no other has begun since. Any thread."""

    def is_evaluating(self, session: _SessionT_contra) -> bool:
        """Whether the program has announced an evaluation, during which no boundary comes. Any thread."""

    def is_alone(self, session: _SessionT_contra) -> bool:
        """Whether this process alone writes a checkpoint, without parts of the same step from other processes."""

    def call_at_rest(self, session: _SessionT_contra, keep: Callable[[bool], None]) -> None:
        """Call ``keep(is_last)`` at the end of each loop, in its thread, before the program goes on. ``is_last`` says
        whether the run ends there.
        """

    def saves_rest(self, session: _SessionT_contra) -> None:
        """Note that the copy of the end of the last loop is about to be written, without a boundary. Other processes
        may have begun the next loop; they have copies of that moment too.
        """

    def come_back(self, session: _SessionT_contra) -> None:
        """Note that the calling thread, if it is that of the steps, runs no more code of the program between two."""

    def is_outside_steps(self, session: _SessionT_contra, error: BaseException) -> bool:
        """Whether ``error`` came from the data, before a step began with it: the state is that of the last boundary."""

    def defer(self, session: _SessionT_contra, callback: Callable[[], None]) -> bool:
        """Call ``callback`` at the end of a step inside which an evaluation runs, or before the next step of the
        program's own loop. Returns whether it will.
        """


class Keeper(Protocol):
    """Keeps what the program says of its steps. Called by threads that train, outside of a step. Raises nothing."""

    def metrics(self, values: Mapping[str, float], step: int | None) -> None:
        """Numbers that were measured at ``step``, the last boundary: they belong to its checkpoint."""

    def save(self, name: str | None, step: int | None) -> None:
        """Save the last boundary, ``step``, now; with a ``name`` it is kept until that is taken away."""


@runtime_checkable
class KeepsOnRequest(Protocol[_SessionT_contra]):
    """An engine whose sessions have methods for metrics and saves, because a program calls them inside a step too."""

    def keep_with(self, session: _SessionT_contra, keeper: Keeper) -> None:
        """From now on hand ``keeper`` what the program says; inside a step, at its end."""

    def hand_over(self, session: _SessionT_contra) -> None:
        """Hand over what the program has said in a last step that was left by ``break``. The run has ended well."""


@runtime_checkable
class TracesSteps(Protocol[_SessionT_contra]):
    """An engine whose sessions tell what their steps are."""

    def trace_steps(self, session: _SessionT_contra, trace: StepTrace) -> Beginning | None:
        """From now on tell ``trace`` of the steps of ``session``. Called before the first of them, once at most.

        Returns where the session begins; ``None`` if its steps are not told, because other processes change the model
        at moments of their own.
        """


@runtime_checkable
class HearsOfCommits(Protocol):
    """An engine that is told when a checkpoint is durable."""

    def committed(self, kept: Sequence[tuple[str, float]]) -> None:
        """Note a new checkpoint. ``kept`` is path and Unix time of all that are kept, oldest first. Writer thread."""


@runtime_checkable
class KeepsCheckpoints(HearsOfCommits, Protocol):
    """An engine whose framework keeps its own list of checkpoints, and removes those that drop off the list."""

    def kept_checkpoints(self) -> Sequence[str]:
        """The names of the checkpoints on that list, oldest first; empty if there is no list. Writer thread."""
