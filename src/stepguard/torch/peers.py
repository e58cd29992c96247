"""Several processes that train one model: they save, and they stop, after the same step.

The processes of ``torchrun`` run the same steps, but not at the same moment: when one of them stands at the boundary
after step 10, another may be in the middle of step 11, and wait there for the first to take part in its all-reduce. So
nobody can be told to stop where he is. Instead the chief opens a round: every process begins no further step and says
how many it has begun; the largest of these numbers is one that all can reach, and there they meet.

All of this goes through the key-value store of ``torch.distributed``. No collective operation is used, so that nothing
comes between those of the training, and a step costs one comparison.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from stepguard.errors import NoBoundaryError

_log = logging.getLogger(__name__)

_LOOK_SECS = 0.01
_PATIENCE_SECS = 30.0

_supervisors = 0


def world() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shared_store() -> Any:
    """A part of the processes' common store that belongs to one Supervisor.

    Every process has to build its Supervisors in the same order, as it has to do with everything distributed.
    """
    global _supervisors  # noqa: PLW0603 - a number for each supervisor of the process
    _supervisors += 1
    # torchrun keeps its store when it starts the processes again, with all that the earlier ones have said in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # A client of our own: a wait on the one that the process group uses would hold that up.
    store = dist.distributed_c10d._get_default_store().clone()
    return dist.PrefixStore(f"stepguard/{attempt}/{_supervisors}", store)


class Gate:
    """Where the steps of one process wait for the others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._limit = math.inf
        self._is_last = False

    def begin(self, steps_done: int) -> bool:
        """The step after ``steps_done`` is to begin: wait if it may not yet; ``False`` if it never may."""
        with self._changed:
            while steps_done >= self._limit:
                if self._is_last:
                    return False
                self._changed.wait()
            self._begun = steps_done + 1
            return True

    def pause(self) -> int:
        """Let no further step begin; how many have."""
        with self._changed:
            self._limit = self._begun
            return self._begun

    def open_until(self, step: float, *, is_last: bool = False) -> None:
        """Let steps begin until ``step`` are done; with ``is_last`` the run ends there."""
        with self._changed:
            self._limit = step
            self._is_last = self._is_last or is_last
            self._changed.notify_all()

    @property
    def is_last(self) -> bool:
        """Whether the step at which the run ends is settled."""
        return self._is_last


class Peers:
    """What one process has to do with the others during one session.

    ``steps_done`` tells how far this process is, ``process_state`` what it has to add to a checkpoint; the latter is
    called while no step runs. Threads: ``start`` and ``close`` by the thread of the session, the others by any.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        gate: Gate,
        *,
        steps_done: Callable[[], int],
        process_state: Callable[[], Any],
        wait_for_stop: Callable[[float], object],
        should_stop: Callable[[], bool],
        request_stop: Callable[[], object],
        has_failed: Callable[[], bool],
    ) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._gate = gate
        self._steps_done = steps_done
        self._process_state = process_state
        self._wait_for_stop = wait_for_stop
        self._should_stop = should_stop
        self._request_stop = request_stop
        self._has_failed = has_failed
        self._rounds = 0
        self._round_lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen to the others."""
        self._thread = threading.Thread(target=self._listen, name="stepguard-peers", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            self._lead() if self._rank == 0 else self._follow()
        except (dist.DistError, RuntimeError) as error:
            # The store ends with the process that has it: the others have ended, or torchrun is about to end us.
            _log.debug("no word from the other processes: %s", error)

    def close(self, timeout_secs: float) -> None:
        """Stop listening; a worker first waits until the chief has saved the last step."""
        if self._rank == 0:
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._store.set("over", b"1")
        elif not self._has_failed():
            deadline = time.monotonic() + timeout_secs
            with contextlib.suppress(dist.DistError, RuntimeError):
                while not self._store.check(["over"]) and time.monotonic() < deadline and not self._has_failed():
                    time.sleep(_LOOK_SECS)
        self._gate.open_until(math.inf)
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # --- the chief ---

    @contextmanager
    def meeting(self, what: str, *, is_last: bool = False) -> Iterator[dict[int, Any]]:
        """A block in which all processes stand after the same step; gives the states of the others, by rank.

        Raises:
            NoBoundaryError: a process did not answer in time.
        """
        with self._round_lock:
            self._rounds += 1
            key = f"round/{self._rounds}"
            begun = self._gate.pause()
            self._store.set(key, b"last" if is_last else b"save")
            try:
                target = max([begun, *(int(self._get(f"{key}/begun/{rank}", what)) for rank in self._others())])
                self._store.set(f"{key}/target", str(target).encode())
                self._gate.open_until(target, is_last=is_last)
                self._await_step(target, what)
                yield {rank: _loaded(self._get(f"{key}/state/{rank}", what)) for rank in self._others()}
            finally:
                self._store.set(f"{key}/done", b"1")
                if not self._gate.is_last:
                    self._gate.open_until(math.inf)

    def _lead(self) -> None:
        """Settle the last step when any process is asked to stop."""
        while not self._closing.is_set():
            if self._should_stop() or self._store.check(["stop"]):
                self._settle_last_step()
                self._request_stop()
                return
            self._wait_for_stop(_LOOK_SECS)

    def _settle_last_step(self) -> None:
        try:
            # After an error, perhaps the loss of a process, there is nothing to agree on.
            if not self._has_failed():
                with self.meeting("a stop", is_last=True):
                    return
        except NoBoundaryError as error:
            _log.warning("stopping without the others: %s", error)
        self._gate.open_until(self._steps_done(), is_last=True)

    def _others(self) -> range:
        return range(1, self._size)

    # --- a worker ---

    def _follow(self) -> None:
        number = 1
        has_asked = False
        while not self._closing.is_set():
            if self._should_stop() and not has_asked:
                self._store.set("stop", b"1")
                has_asked = True
            if self._store.check([f"round/{number}"]):
                self._take_part(f"round/{number}")
                number += 1
            else:
                self._closing.wait(_LOOK_SECS)

    def _take_part(self, key: str) -> None:
        is_last = self._store.get(key) == b"last"
        self._store.set(f"{key}/begun/{self._rank}", str(self._gate.pause()).encode())
        try:
            target = int(self._get(f"{key}/target", "a checkpoint"))
            self._gate.open_until(target, is_last=is_last)
            self._await_step(target, "a checkpoint")
            self._store.set(f"{key}/state/{self._rank}", _saved(self._process_state()))
            self._get(f"{key}/done", "a checkpoint")
        except NoBoundaryError as error:
            _log.warning("a round of the chief was left: %s", error)
        if is_last:
            self._request_stop()
        elif not self._gate.is_last:
            self._gate.open_until(math.inf)

    # --- both ---

    def _await_step(self, target: int, what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECS
        while self._steps_done() < target:
            self._check_time(deadline, f"{what}: step {target} of this session is still under way in rank {self._rank}")
            self._closing.wait(_LOOK_SECS / 5)

    def _get(self, key: str, what: str) -> bytes:
        deadline = time.monotonic() + _PATIENCE_SECS
        while not self._store.check([key]):
            self._check_time(deadline, f"{what}: no answer to {key}; a process may have ended")
            self._closing.wait(_LOOK_SECS / 5)
        return bytes(self._store.get(key))

    def _check_time(self, deadline: float, text: str) -> None:
        if self._closing.is_set() or self._has_failed() or time.monotonic() > deadline:
            raise NoBoundaryError(f"no step boundary for {text}")


def announce(store: Any, number: int, restored: str | None) -> None:
    """The chief tells the workers which checkpoint it has restored in its session ``number``, or that there is none."""
    store.set(f"restored/{number}", json.dumps(restored).encode())


def announced(store: Any, number: int, should_stop: Callable[[], bool]) -> str | None:
    """A worker waits for that, however long the chief takes to verify it."""
    while not store.check([f"restored/{number}"]):
        if should_stop():
            raise RuntimeError("stopped while waiting for the chief to restore the model")
        time.sleep(_LOOK_SECS)
    name = json.loads(bytes(store.get(f"restored/{number}")))
    return None if name is None else str(name)


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _loaded(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)
