"""Several processes that train one model: they save, and they stop, after the same step.

The processes run the same steps, but not at the same moment: when one of them stands at the boundary after step 10,
another may be in the middle of step 11, and wait there for the first to take part in its all-reduce. So nobody can be
told to stop where he is. Instead the chief asks how far each has begun, and the largest of these numbers is one that
all can reach.

Who waits for whom. Each process has a thread that listens to the words that are said to all (:mod:`.word_log`), and
does nothing that could wait: it moves the gate of its process, and starts threads for what takes time. A step waits at
the gate, so for that thread. The chief's saving thread waits for the answers of all listening threads, which come at
once, and for steps of its own process. The threads that write wait for steps of their own process and for each other,
as in :mod:`.exchange`. So there is no circle: listening threads wait for nobody, steps for listening threads, all
others for these two. Each wait on another process has a patience, or ends when one of them is gone.

A round for a checkpoint stops nobody: each process promises to go no more than so many steps ahead, as many as are run
while the answers travel; the largest promise is the step of the checkpoint, and all have heard of it before they come
there. Each takes what it adds to the checkpoint when it passes that step, and goes on; the files are written when the
chief's writer asks for them. Where the steps of the checkpoints are known to all beforehand, nothing is asked at all.

A kill leaves the store as it is: the next start uses another part of it. The others are told by the end of the
connection when the process that holds the store is killed, and by their collective operations when it is another one;
a round that waits for it is given up after the patience. Who leaves while the others go on says so, and they end.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from stepguard.errors import CheckpointError, NoBoundaryError, NonFiniteError, PeerLeftError, described
from stepguard.steps.common_store import CommonStore, StoreLostError, awaited
from stepguard.steps.exchange import Exchange
from stepguard.steps.gate import Gate, Loop
from stepguard.steps.word_log import Word, WordLog

_log = logging.getLogger(__name__)

PATIENCE_SECS = 30.0
# After a second Ctrl-C, which is to end this process at once.
_IMPATIENCE_SECS = 1.0
# How long a process that has failed waits for the parts of the others, who may have ended too.
_FAREWELL_SECS = 5.0
# How often a thread that waits for a stop of its own process looks whether its session was closed without one.
_CLOSED_LOOK_SECS = 0.5


class Member(Protocol):
    """One process of the training, as its rendezvous sees it. Any thread."""

    def steps_done(self) -> int:
        """The steps that are done in this session."""

    def take_state(self) -> int:
        """Copy what this process adds to a checkpoint, between two steps; after how many of them.

        Raises:
            NoBoundaryError: no boundary came in time.
        """

    def write_part(self, exchange: Exchange, place: str, held: AbstractContextManager[None]) -> None:
        """Write what was taken into the directory ``place`` of the logdir, and answer the chief. A thread's edge.

        Inside ``held`` it is there, and stays; where it is not, that is raised there, and answered too.
        """

    def should_stop(self) -> bool:
        """Whether this process was asked to stop."""

    def wait_for_stop(self, timeout_secs: float) -> object:
        """Wait until it is, and at most so long."""

    def request_stop(self, error: BaseException | None) -> None:
        """Ask it, for ``error`` if there is one."""

    def error(self) -> BaseException | None:
        """What it stops for, if that is an error; a NonFiniteError is told to the others, who stop for it too."""

    def is_impatient(self) -> bool:
        """Whether a second Ctrl-C has ended it."""


class Rendezvous(ABC):
    """What one process has to do with the others during one session.

    ``grace_secs`` is how long, in seconds, the others wait in a step for a chief that is between two loops.
    Threads: ``start`` and ``close`` by the thread of the session, the others by any.
    """

    def __init__(
        self, store: CommonStore, rank: int, size: int, gate: Gate, member: Member, *, grace_secs: float
    ) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._gate = gate
        self._member = member
        self._grace_secs = grace_secs
        self._words = WordLog(store, rank)
        # Nothing more is heard of the others: the run is over, or one of them is gone, and which.
        self._is_over = threading.Event()
        self._gone: str | None = None
        self._finished_after: int | None = None
        self._failed_at: float | None = None
        self._closing = threading.Event()
        gate.attend(self)
        self._thread = threading.Thread(target=self._listen, name="stepguard-peers", daemon=True)

    def start(self) -> None:
        """Listen to the others."""
        self._thread.start()
        threading.Thread(target=self._await_stop, name="stepguard-stop", daemon=True).start()

    # --- the thread that trains, between two steps ---

    @abstractmethod
    def take_state(self) -> None:
        """Take what this process adds to a checkpoint."""

    @abstractmethod
    def loop_changed(self) -> None:
        """A loop has begun, was left, or has ended."""

    # --- listening ---

    def _listen(self) -> None:
        try:
            for word in self._words.listen():
                if word.kind == "over":
                    break
                if word.kind == "gone":
                    self._hear_gone(word.rank, *word.content)
                    break
                if word.kind == "finished":
                    self._hear_finished(word.rank, *word.content)
                else:
                    self._hear(word)
        except StoreLostError as error:
            # The store ends with the process that has it: the others have ended, or a launcher is about to end us.
            _log.debug("no word from the other processes: %s", error)
            self._gone = "the process that holds the common store has ended"
        finally:
            # What the others would have to say is not waited for any longer: a collective operation fails by itself.
            self._gate.abandon()
            self._is_over.set()

    @abstractmethod
    def _hear(self, word: Word) -> None:
        """Do what it asks for, without waiting for anything."""

    def _hear_finished(self, rank: int, steps: int) -> None:
        """The process of ``rank`` begins no step after ``steps``, and has not asked the others."""
        self._finished_after = steps
        error = PeerLeftError(
            f"rank {rank} has left the training after {steps} steps of this session, by `break` or an exit, and this "
            f"process was to go on: all processes have to leave their loops after the same step",
            rank=rank,
        )
        if rank != self._rank and self._gate.refuse_after(steps, error):
            # Perhaps in a collective operation that the other will never take part in: it ends when that process does.
            self._member.request_stop(error)
            self._words.say("over", unless_said=True)

    def _hear_gone(self, rank: int, why: str) -> None:
        self._gone = f"rank {rank} was left {why}"
        if rank == self._rank:
            return
        _log.warning("%s: nothing is saved any more together with it", self._gone)
        gate = self._gate
        if self._member.should_stop():
            gate.open_until(gate.begun, is_last=True)
            return
        error = PeerLeftError(f"{self._gone}, and this process was to go on", rank=rank)
        gate.refuse_after(gate.begun, error)
        if gate.loop is Loop.RUNS:
            self._member.request_stop(error)

    def _await_stop(self) -> None:
        """Tell the others when this process is asked to stop. A thread's edge."""
        with contextlib.suppress(StoreLostError):
            while not self._closing.is_set():
                if not self._member.should_stop():
                    self._member.wait_for_stop(_CLOSED_LOOK_SECS)
                elif self._gate.loop is Loop.LEFT:
                    # Left by the program, which may end here: then `close` says so. Or it begins another loop.
                    self._gate.await_change(_CLOSED_LOOK_SECS, lambda: self._gate.loop is not Loop.LEFT)
                else:
                    self._ask_stop()
                    return

    @abstractmethod
    def _ask_stop(self) -> None:
        """Have all processes stop after the same step."""

    # --- closing ---

    def close(self, timeout_secs: float) -> None:
        """Stop listening: the chief when the last step is settled with the others, a worker when the chief is done."""
        with contextlib.suppress(StoreLostError):
            if not self._is_over.is_set():
                self._say_farewell(timeout_secs)
        self._closing.set()
        self._gate.abandon()
        self._thread.join(_FAREWELL_SECS)

    @abstractmethod
    def _say_farewell(self, timeout_secs: float) -> None:
        """Have the thread that listens come to its end, here and, where this is the chief, everywhere."""

    def _has_failed(self) -> bool:
        """Not so after a sight of the NaN guard: this process runs as well as ever, and can stop with the others."""
        return not isinstance(self._member.error(), (NonFiniteError, type(None)))

    def _say_if_left(self) -> None:
        """Tell the others if they cannot know that this process begins no further step."""
        error = self._member.error()
        if self._member.is_impatient():
            self._words.say("gone", "by a second Ctrl-C", unless_said=True)
        elif error is not None and self._has_failed() and not isinstance(error, PeerLeftError):
            self._words.say("gone", f"for an error, {described(error):.500}", unless_said=True)
        elif error is not None and self._has_failed():
            self._words.say("over", unless_said=True)
        elif self._gate.loop is not Loop.ENDED and self._finished_after != self._member.steps_done():
            self._words.say("finished", self._member.steps_done(), unless_said=True)

    # --- waiting for others ---

    def _sight(self) -> list[object] | None:
        """What this process has seen that is not finite, as the others are told."""
        error = self._member.error()
        if not isinstance(error, NonFiniteError):
            return None
        return [f"rank {self._rank}: {error}", error.step, list(error.names)]

    def _exchange(self, number: int) -> Exchange:
        return Exchange(self._store.below(f"write/{number}"), self._rank, self._size, self._check_alive)

    def _check_alive(self, what: str) -> None:
        """A write may take any time, as long as all are there."""
        if self._closing.is_set():
            raise CheckpointError(f"{what}: the session was closed while the others were writing their parts")
        if self._gone is not None:
            raise CheckpointError(f"{what}: {self._gone}")
        if not self._has_failed():
            self._failed_at = None
        elif self._failed_at is None:
            self._failed_at = time.monotonic()
        elif time.monotonic() > self._failed_at + _FAREWELL_SECS:
            raise CheckpointError(f"{what}: no answer from another process, and this one has failed; it may have ended")

    def _gather(self, keys: Sequence[str], what: str, patience_secs: float = PATIENCE_SECS) -> list[bytes]:
        """The answers of others that are to come at once.

        Raises:
            NoBoundaryError: one of them did not come in time.
        """
        patience = self._patience(f"{what}: no answer from another process; one may have ended", patience_secs)
        return awaited(self._store, keys, patience)

    def _patience(self, text: str, patience_secs: float = PATIENCE_SECS) -> Callable[[], None]:
        """Raises NoBoundaryError once it is called when time is over, or when there is nothing to wait for."""
        began = time.monotonic()

        def check() -> None:
            left_secs = began + patience_secs - time.monotonic()
            if self._member.is_impatient():
                left_secs = min(left_secs, began + _IMPATIENCE_SECS - time.monotonic())
            if self._gone is not None:
                raise NoBoundaryError(f"no step boundary for {text}: {self._gone}")
            if left_secs < 0 or self._closing.is_set() or self._is_over.is_set() or self._has_failed():
                raise NoBoundaryError(f"no step boundary for {text}")

        return check

    def _await_steps(self, steps: int, check: Callable[[], None]) -> None:
        """Wait until so many steps are done, or the loop has ended, in time that ``check`` allows."""
        gate, member = self._gate, self._member
        while not gate.await_change(0.05, lambda: member.steps_done() >= steps or gate.loop is Loop.ENDED):
            check()


def as_error(sight: Sequence[object] | None) -> NonFiniteError | None:
    """The error for what another process has seen."""
    if sight is None:
        return None
    text, step, names = sight
    return NonFiniteError(str(text), step=step, names=names)  # type: ignore[arg-type]
