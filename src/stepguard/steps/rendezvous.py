"""Several processes that train one model: they save, and they stop, after the same step.

The processes run the same steps, but not at the same moment. When one process stands at the boundary after step 10,
another may be in the middle of step 11 and wait there for the all-reduce of the first. So no process can be told to
stop where it is. Instead the chief asks each process how many steps it has begun; all processes can reach the largest
of these numbers.

Who waits for whom: each process has a thread that listens to the words that are said to all (:mod:`.word_log`). This
thread never waits for anything else: it moves the gate of its process, and starts threads for longer work. A step waits
only at the gate, so only for the listening thread. The chief's saving thread waits for the answers of all listening
threads, which come at once, and for steps of its own process. The threads that write wait for steps of their own
process and for each other (see :mod:`.part_messages`). This order has no circle, so no deadlock is possible: listening
threads wait for no other thread, steps wait for listening threads, and all other threads wait for these two kinds. Each
wait for another process has a patience, or ends when that process is gone.

A round for a checkpoint stops no process. Each process promises not to go further than a number of steps ahead, as many
as are run while the answers travel. The largest promise is the step of the checkpoint, and all processes know it before
they reach that step. Each process copies its part of the checkpoint when it passes that step, and goes on; it writes
its file when the chief's writer asks for it. If all processes know the steps of the checkpoints beforehand, the chief
asks nothing.

Between two loops the state belongs to the program. Each process therefore copies its part when its loop ends, before
the program goes on, and nothing reads the state after that. With uneven inputs a process may have ended a loop that
the others still run: its part is the one of its loop's end. So a place in the program is a :class:`.Moment`, in which
the steps count from the beginning of their loop.

A kill leaves the store as it is; the next start uses another part of it. If the process that holds the store is killed,
the others notice the end of their connections. If another process is killed, their collective operations fail, and a
round that waits for it is given up after the patience. A process that leaves while the others go on says so, and they
end.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

from stepguard.errors import CheckpointError, NoBoundaryError, NonFiniteError, PeerLeftError, described
from stepguard.steps.common_store import CommonStore, StoreLostError, awaited
from stepguard.steps.gate import Gate, Loop, Moment
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.word_log import Word, WordLog
from stepguard.words import logger

_log = logger(__name__)

PATIENCE_SECS = 30.0
# The patience after a second Ctrl-C, which is meant to end this process at once.
_IMPATIENCE_SECS = 1.0
# How long a process waits for the parts of the others, which may have ended too, when it has failed or the run is over.
_FAREWELL_SECS = 5.0
# How often the thread that waits for a stop of its process checks whether the session was closed without one.
_CLOSED_LOOK_SECS = 0.5
# How long a step may stay in one call, in and outside of the framework, after another process has left in that step.
_STUCK_SECS = 5.0
_STUCK_ELSEWHERE_SECS = 60.0
_STUCK_LOOK_SECS = 0.1
# A process that uses more than this part of one processor is at work, also on a busy machine; one that waits uses less.
_WORKING_SHARE = 0.05


class Part(Protocol):
    """A copy of one process's part of a checkpoint, which nothing changes."""

    @property
    def moment(self) -> Moment:
        """The moment of the copied state."""

    @property
    def steps(self) -> int:
        """The steps done in this session."""


class Member(Protocol):
    """One process of the training, as its rendezvous sees it. Any thread."""

    def steps_done(self) -> int:
        """The number of steps done in this session."""

    def moment(self) -> Moment:
        """How far this process is."""

    def take_part(self) -> Part:
        """Copy this process's part of a checkpoint between two steps. The memory of parts that are gone is reused.

        Raises:
            NoBoundaryError: no boundary came in time.
        """

    def write_part(self, messages: PartMessages, place: str, part: Callable[[], Any]) -> None:
        """Write the part that ``part()`` returns into ``place`` of the logdir, and answer the chief. Never raises.

        If ``part()`` raises, the error is the answer.
        """

    def should_stop(self) -> bool:
        """Whether this process was asked to stop."""

    def wait_for_stop(self, timeout_secs: float) -> object:
        """Wait until this process is asked to stop, at most ``timeout_secs``."""

    def has_ended(self) -> bool:
        """Whether the run is over in this process although nobody asked it to stop, and without an error."""

    def stop_reason(self) -> str | None:
        """Who asked this process to stop, as the ledger says it; ``None`` if nobody did."""

    def request_stop(self, error: BaseException | None, reason: str | None = None) -> None:
        """Ask this process to stop: because of ``error``, or because another process was asked to, by ``reason``."""

    def error(self) -> BaseException | None:
        """The error for which this process stops, if any. The others are told of a NonFiniteError, and stop for it."""

    def is_impatient(self) -> bool:
        """Whether a second Ctrl-C has ended this process."""

    def is_collective(self, file: str) -> bool:
        """Whether a thread that stays in a call of the module ``file`` waits for the other processes."""


class Rendezvous(ABC):
    """The connection of one process with the others during one session.

    ``grace_secs`` is how long, in seconds, the others wait in a step for a chief that is between two loops.
    Threads: the thread of the session calls ``start`` and ``close``; any thread calls the other methods.
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
        # Set when listening ends: because the run is over, or because a process is gone (`_gone` says which and why).
        self._is_over = threading.Event()
        self._gone: str | None = None
        self._finished_at: Moment | None = None
        # Since when this process has failed, or the run is over.
        self._ending_since: float | None = None
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
        """Copy this process's part of a checkpoint."""

    @abstractmethod
    def loop_changed(self, *, is_due: bool) -> None:
        """A loop has begun, was left, or has ended; ``is_due`` if a copy is due at its end."""

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
            # The store ends with the process that holds it. The others have ended, or a launcher is about to end us.
            _log.debug("no word from the other processes: %s", error)
            self._gone = "the process that holds the common store has ended"
        finally:
            # No step waits for the others any longer; if one of them is gone, the next collective operation fails.
            self._gate.abandon()
            self._is_over.set()

    @abstractmethod
    def _hear(self, word: Word) -> None:
        """Do what ``word`` asks for, without waiting for anything."""

    def _hear_finished(self, rank: int, steps: int, moment: Sequence[int]) -> None:
        """Handle the word that ``rank`` has left its loop at ``moment``, without a stop of all processes."""
        self._finished_at = left_at = Moment(*moment)
        error = PeerLeftError(
            f"rank {rank} has left the training after {steps} steps of this session, by `break` or an exit, and this "
            f"process was to go on: all processes have to leave their loops after the same step",
            rank=rank,
        )
        if rank == self._rank:
            return
        if self._gate.refuse_after(left_at, error):
            # This step may be in a collective operation that waits for the other process; it fails when that one ends.
            self._member.request_stop(error)
            self._words.say("over", unless_said=True)
        elif self._member.moment() < self._gate.begun == left_at:
            # That process has left in the middle of the step in which this one still is.
            threading.Thread(target=self._watch_step, args=(error,), name="stepguard-left", daemon=True).start()

    def _watch_step(self, error: PeerLeftError) -> None:
        """Stop for ``error`` if the step under way waits for the process that has left. Runs on a thread of its own.

        The step may also come to its end, and leave its loop as the other process did. So a wait is told from work: the
        thread of the step stays in one call, and the process uses no processor.
        """
        step, place = self._gate.begun, None
        since, used_secs = time.monotonic(), time.process_time()
        while not (self._closing.wait(_STUCK_LOOK_SECS) or self._is_over.is_set() or self._member.moment() >= step):
            frame = sys._current_frames().get(self._gate.trainer or 0)
            here = _calls(frame)
            now, used_until_now = time.monotonic(), time.process_time()
            # A call that returns and is made again looks like one call.
            if here != place or used_until_now - used_secs > _WORKING_SHARE * (now - since):
                place, since, used_secs = here, now, used_until_now
            is_collective = frame is not None and self._member.is_collective(frame.f_code.co_filename)
            del frame
            if now - since > (_STUCK_SECS if is_collective else _STUCK_ELSEWHERE_SECS):
                # A collective operation fails when the process that it waits for ends: it has this one's word for that.
                self._member.request_stop(error)
                with contextlib.suppress(StoreLostError):
                    self._words.say("gone", f"in the middle of a step, as rank {error.rank} was", unless_said=True)
                return

    def _hear_gone(self, rank: int, why: str) -> None:
        self._gone = f"rank {rank} was left {why}"
        if rank == self._rank:
            return
        _log.warning("%s: no further checkpoint is saved with it", self._gone)
        gate = self._gate
        if self._member.should_stop():
            gate.open_until(gate.begun, is_last=True)
            return
        error = PeerLeftError(f"{self._gone}, and this process was to go on", rank=rank)
        gate.refuse_after(gate.begun, error)
        if gate.loop is Loop.RUNS:
            self._member.request_stop(error)

    def _await_stop(self) -> None:
        """Wait until this process is asked to stop, and tell the others. Runs on a thread of its own."""
        with contextlib.suppress(StoreLostError):
            while not self._closing.is_set():
                if not self._member.should_stop():
                    self._member.wait_for_stop(_CLOSED_LOOK_SECS)
                elif self._gate.loop is Loop.LEFT and self._member.has_ended():
                    # Not only when the session is closed: the last checkpoint may need a process that needs this one.
                    self._say_if_left()
                    return
                elif self._gate.loop is Loop.LEFT:
                    # The program has left its loop. If it ends here, `close` tells the others; or it begins a new loop.
                    self._gate.await_change(_CLOSED_LOOK_SECS, lambda: self._gate.loop is not Loop.LEFT)
                else:
                    self._ask_stop()
                    return

    @abstractmethod
    def _ask_stop(self) -> None:
        """Have all processes stop after the same step."""

    # --- closing ---

    def close(self, timeout_secs: float) -> None:
        """Stop listening. The chief first settles the last step with the others; a worker waits for the chief's end."""
        with contextlib.suppress(StoreLostError):
            if not self._is_over.is_set():
                self._say_farewell(timeout_secs)
        self._closing.set()
        self._gate.abandon()
        self._thread.join(_FAREWELL_SECS)

    @abstractmethod
    def _say_farewell(self, timeout_secs: float) -> None:
        """End the listening thread of this process; the chief ends the listening threads of all processes."""

    def _has_failed(self) -> bool:
        """Whether an error ends this process. A NonFiniteError does not count: it can still stop with the others."""
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
        elif self._gate.loop is not Loop.ENDED and self._finished_at != self._member.moment():
            self._words.say("finished", self._member.steps_done(), self._member.moment(), unless_said=True)

    # --- waiting for others ---

    def _sight(self) -> list[object] | None:
        """The message for the others about a non-finite value that this process has seen; ``None`` without one."""
        error = self._member.error()
        if not isinstance(error, NonFiniteError):
            return None
        return [f"rank {self._rank}: {error}", error.step, list(error.names)]

    def _part_messages(self, number: int) -> PartMessages:
        return PartMessages(self._store.below(f"write/{number}"), self._rank, self._size, self._check_alive)

    def _check_alive(self, what: str) -> None:
        """Raise CheckpointError or NoBoundaryError if the parts cannot be completed.

        A write has no time limit while all are alive.
        """
        if self._closing.is_set():
            raise CheckpointError(f"{what}: the session was closed while the others were writing their parts")
        if self._gone is not None and self._gate.loop is Loop.LEFT:
            # The last checkpoint of a program that has left the training is skipped, whenever the others have gone.
            raise NoBoundaryError(f"no step boundary for {what}: {self._gone}")
        if self._gone is not None:
            raise CheckpointError(f"{what}: {self._gone}")
        # Who says that the run is over listens to no request any more, and answers only those that came before.
        if not (self._has_failed() or self._is_over.is_set()):
            self._ending_since = None
        elif self._ending_since is None:
            self._ending_since = time.monotonic()
        elif time.monotonic() > self._ending_since + _FAREWELL_SECS:
            raise CheckpointError(f"{what}: no answer from another process, and the run is ending; it may have ended")

    def _gather(self, keys: Sequence[str], what: str, patience_secs: float = PATIENCE_SECS) -> list[bytes]:
        """Wait for answers that the others give at once, and return them.

        Raises:
            NoBoundaryError: an answer did not come in time.
        """
        patience = self._patience(f"{what}: no answer from another process; one may have ended", patience_secs)
        return awaited(self._store, keys, patience)

    def _patience(self, text: str, patience_secs: float = PATIENCE_SECS) -> Callable[[], None]:
        """A function that raises NoBoundaryError if the time is over, or if there is nothing left to wait for."""
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

    def _await_moment(self, moment: Moment, check: Callable[[], None]) -> None:
        """Wait until this process is at ``moment`` or its loop has ended; ``check`` raises when the time is over."""
        gate, member = self._gate, self._member
        while not gate.await_change(0.05, lambda: member.moment() >= moment or gate.loop is Loop.ENDED):
            check()


def _calls(frame: FrameType | None) -> list[tuple[int, int]]:
    """The calls in which a thread is, from the innermost: what identifies their frames, and how far these are."""
    calls = []
    while frame is not None:
        calls.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return calls


def as_error(sight: Sequence[object] | None) -> NonFiniteError | None:
    """The error for a non-finite value that another process has seen."""
    if sight is None:
        return None
    text, step, names = sight
    return NonFiniteError(str(text), step=step, names=names)  # type: ignore[arg-type]
