"""Several processes that train one model: they save, and they stop, after the same step.

The processes of one training run the same steps, but not at the same moment: when one of them stands at the boundary
after step 10, another may be in the middle of step 11, and wait there for the first to take part in its all-reduce. So
nobody can be told to stop where he is. Instead the chief opens a round: every process begins no further step and says
how many it has begun; the largest of these numbers is one that all can reach, and there they meet. Checkpoints every so
many steps need no round to agree on one: there each process waits by itself until the chief has saved, or has not.

All of this goes through the store that the processes have in common. No collective operation is used, so that nothing
comes between those of the training, and a step costs one comparison.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from stepguard.errors import CheckpointError, NoBoundaryError, NonFiniteError
from stepguard.steps.common_store import CommonStore
from stepguard.steps.exchange import Exchange
from stepguard.steps.gate import Gate

_log = logging.getLogger(__name__)

_LOOK_SECS = 0.01
_PATIENCE_SECS = 30.0
# After a second Ctrl-C, which is to end this process at once.
_IMPATIENCE_SECS = 1.0
# How long a process that has failed waits for the parts of the others, who may have ended too.
_FAREWELL_SECS = 5.0


class Member(Protocol):
    """One process of the training, as its rendezvous sees it. Any thread."""

    def steps_done(self) -> int:
        """The steps that are done in this session."""

    def process_state(self) -> bytes:
        """What this process adds to a checkpoint; called while no step is to begin."""

    def write_part(self, exchange: Exchange, place: str) -> None:
        """Write the part that this process has of the snapshot taken last. A thread that writes."""

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


class Rendezvous:
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
        self._messages = 0
        self._is_sight_shared = False
        self._message_lock = threading.Lock()
        self._round_lock = threading.Lock()
        self._writing: threading.Thread | None = None
        self._failed_at: float | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen to the others."""
        self._thread = threading.Thread(target=self._listen, name="stepguard-peers", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            self._lead() if self._rank == 0 else self._follow()
        except ConnectionError as error:
            # The store ends with the process that has it: the others have ended, or torchrun is about to end us.
            _log.debug("no word from the other processes: %s", error)
            # What they would have to say is not waited for any longer: the next collective operation fails by itself.
            self._gate.abandon()

    def close(self, timeout_secs: float) -> None:
        """Stop listening: the chief when the last step is settled with the others, a worker when the chief is done."""
        if self._rank == 0:
            if self._member.should_stop():
                self._join(timeout_secs)
            with contextlib.suppress(ConnectionError):
                self._store.set("over", b"1")
        elif self._member.is_impatient():
            with contextlib.suppress(ConnectionError):
                self._store.set("left", str(self._rank).encode())
        elif not self._has_failed():
            deadline = time.monotonic() + timeout_secs
            with contextlib.suppress(ConnectionError):
                while not self._store.check("over") and time.monotonic() < deadline and not self._has_failed():
                    time.sleep(_LOOK_SECS)
        writing = self._writing
        if writing is not None:
            # This process has failed, or the chief has: a part that is being written may complete a checkpoint.
            writing.join(min(timeout_secs, _FAREWELL_SECS))
        self._gate.open_until(math.inf)
        self._closing.set()
        self._join()

    def _join(self, timeout_secs: float | None = None) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_secs)

    # --- the chief ---

    @contextmanager
    def meeting(self, what: str, *, is_last: bool = False) -> Iterator[dict[int, bytes]]:
        """A block in which all processes stand after the same step; gives the states of the others, by rank.

        Raises:
            NoBoundaryError: a process did not answer in time.
        """
        with self._round_lock:
            begun = self._gate.pause()
            key = self._send("last" if is_last else "save")
            try:
                target = max([begun, *(int(self._get(f"{key}/begun/{rank}", what)) for rank in self._others())])
                self._store.set(f"{key}/target", str(target).encode())
                self._gate.open_until(target)
                self._await_step(target, what)

                def is_evaluating() -> bool:
                    # Others are in a step that takes all of them: they wait for this process.
                    return self._gate.has_ended and self._member.steps_done() < target

                states = {rank: self._get(f"{key}/state/{rank}", what, is_evaluating) for rank in self._others()}
                # Each has told before its state what it has seen until here.
                sight = self._share_sight()
                if sight is not None and not is_last:
                    raise NoBoundaryError(f"{what} is not taken: {sight}")
                yield states
            finally:
                self._store.set(f"{key}/done", b"1")
                if not is_last and not self._gate.is_last:
                    self._gate.open_until(math.inf)

    def passed(self) -> None:
        """The chief has done what it does at this boundary: the others need not wait for it here."""
        self._store.set("passed", str(self._member.steps_done()).encode())

    def exchange(self, place: str) -> Exchange:
        """Ask the others for their parts of the snapshot taken last, to be written to ``place`` below the logdir."""
        return self._exchange(self._send("write", place))

    def _send(self, kind: str, *content: str) -> str:
        """Tell all others, who take one message after the other; the beginning of the keys of their answers."""
        with self._message_lock:
            self._messages += 1
            key = f"message/{self._messages}"
            self._store.set(key, json.dumps([kind, *content]).encode())
        return key

    def _lead(self) -> None:
        """Settle the last step when any process is asked to stop."""
        while not self._closing.is_set():
            if self._member.should_stop() or self._store.check("stop"):
                self._settle_last_step()
                self._member.request_stop(None)
                return
            self._member.wait_for_stop(_LOOK_SECS)

    def _settle_last_step(self) -> None:
        try:
            # After an error, perhaps the loss of a process, there is nothing to agree on.
            if not self._has_failed():
                with self.meeting("a stop", is_last=True):
                    return
        except NoBoundaryError as error:
            _log.warning("stopping without the others: %s", error)
        finally:
            # Only now: who leaves its loop has to know whether the run has ended well.
            self._gate.open_until(self._member.steps_done(), is_last=True)

    def _others(self) -> range:
        return range(1, self._size)

    # --- a worker ---

    def _follow(self) -> None:
        number = 1
        has_asked = False
        while not self._closing.is_set():
            if self._member.should_stop() and not has_asked:
                self._share_sight()
                self._store.set("stop", b"1")
                has_asked = True
            if self._store.check(f"message/{number}"):
                self._obey(f"message/{number}")
                number += 1
            elif self._gate.is_awaiting_chief:
                self._look_for_chief()
                self._closing.wait(_LOOK_SECS / 5)
            else:
                self._closing.wait(_LOOK_SECS)

    def _look_for_chief(self) -> None:
        if self._store.check("over"):
            self._gate.chief_passed(sys.maxsize)
        elif self._store.check("passed"):
            self._gate.chief_passed(int(self._store.get("passed")))

    def _obey(self, key: str) -> None:
        kind, *content = json.loads(self._store.get(key))
        if kind == "write":
            # In a thread of its own: the next message may be a stop.
            arguments = (self._exchange(key), *content)
            self._writing = threading.Thread(
                target=self._member.write_part, args=arguments, name="stepguard-writer", daemon=True
            )
            self._writing.start()
        else:
            self._take_part(key, is_last=kind == "last")

    def _take_part(self, key: str, *, is_last: bool) -> None:
        self._store.set(f"{key}/begun/{self._rank}", str(self._gate.pause()).encode())
        try:
            target = int(self._get(f"{key}/target", "a checkpoint"))
            self._gate.open_until(target)
            self._await_step(target, "a checkpoint", lambda: not self._store.check(f"{key}/done"))
            self._share_sight()
            # Nothing is saved at a stop itself, and the memory for it may still be being written.
            self._store.set(f"{key}/state/{self._rank}", b"" if is_last else self._member.process_state())
            self._get(f"{key}/done", "a checkpoint")
            self._share_sight()
        except NoBoundaryError as error:
            _log.warning("a round of the chief was left: %s", error)
        finally:
            if is_last:
                # Not before: who leaves its loop has to know whether the run has ended well.
                self._member.request_stop(None)
                self._gate.open_until(self._member.steps_done(), is_last=True)
        if not is_last and not self._gate.is_last:
            self._gate.open_until(math.inf)

    # --- both ---

    def _has_failed(self) -> bool:
        """Not so after a sight of the NaN guard: this process runs as well as ever, and can stop with the others."""
        return not isinstance(self._member.error(), (NonFiniteError, type(None)))

    def _share_sight(self) -> NonFiniteError | None:
        """Tell the others what this process has seen that is not finite, or stop for what one of them has."""
        own = self._member.error()
        if isinstance(own, NonFiniteError):
            if not self._is_sight_shared:
                self._is_sight_shared = True
                content = [f"rank {self._rank}: {own}", own.step, own.names]
                self._store.set("sight", json.dumps(content).encode())
            return own
        if not self._store.check("sight"):
            return None
        text, step, names = json.loads(self._store.get("sight"))
        theirs = NonFiniteError(text, step=step, names=names)
        self._is_sight_shared = True
        self._member.request_stop(theirs)
        return theirs

    def _exchange(self, key: str) -> Exchange:
        return Exchange(self._store.below(key), self._rank, self._size, self._check_alive)

    def _check_alive(self, what: str) -> None:
        """A write may take any time, as long as all are there."""
        if self._closing.is_set():
            raise CheckpointError(f"{what}: the session was closed while the others were writing their parts")
        if not self._has_failed():
            self._failed_at = None
        elif self._failed_at is None:
            self._failed_at = time.monotonic()
        elif time.monotonic() > self._failed_at + _FAREWELL_SECS:
            raise CheckpointError(f"{what}: no answer from another process, and this one has failed; it may have ended")

    def _await_step(self, target: int, what: str, is_excused: Callable[[], bool] = lambda: False) -> None:
        where = f"{what}: step {target} of this session is still under way in rank {self._rank}"
        self._await(lambda: self._member.steps_done() >= target or self._gate.has_ended, where, is_excused)

    def _get(self, key: str, what: str, is_excused: Callable[[], bool] = lambda: False) -> bytes:
        missing = f"{what}: no answer to {key}; a process may have ended"
        self._await(lambda: self._store.check(key), missing, is_excused)
        return self._store.get(key)

    def _await(self, is_there: Callable[[], bool], text: str, is_excused: Callable[[], bool] = lambda: False) -> None:
        """Wait; the time that is excused does not count, but for ``grace_secs``."""
        began = counted_from = time.monotonic()
        while True:
            now = time.monotonic()
            patience_secs = _IMPATIENCE_SECS if self._member.is_impatient() else _PATIENCE_SECS
            if not self._member.is_impatient() and now < began + self._grace_secs and is_excused():
                counted_from = now
            # Asked first: what was there when this process closed has come in time.
            is_over = self._closing.is_set() or self._has_failed() or now > counted_from + patience_secs
            left = self._rank == 0 and self._store.check("left")
            if is_there():
                return
            if left:
                text = f"{text}: rank {self._store.get('left').decode()} was left by a second Ctrl-C"
            if is_over or left:
                raise NoBoundaryError(f"no step boundary for {text}")
            self._closing.wait(_LOOK_SECS / 5)


def announce(store: CommonStore, number: int, restored: str | None) -> None:
    """The chief tells the workers which checkpoint it has restored in its session ``number``, or that there is none."""
    store.set(f"restored/{number}", json.dumps(restored).encode())


def announced(store: CommonStore, number: int, should_stop: Callable[[], bool]) -> str | None:
    """A worker waits for that, however long the chief takes to verify it."""
    while not store.check(f"restored/{number}"):
        if should_stop():
            raise RuntimeError("stopped while waiting for the chief to restore the model")
        time.sleep(_LOOK_SECS)
    name = json.loads(store.get(f"restored/{number}"))
    return None if name is None else str(name)
