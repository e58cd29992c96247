"""Calls into a server that may never answer, made in such a way that the caller can be freed.

The protocol: each calling thread has a courier, a thread that makes its calls. The caller puts a call into the
courier's inbox and waits on the call's lock ``_ended``. Three events release that lock: the courier has made the
call; :meth:`ReleasableCalls.lose` ends all calls under way, from any thread; or the caller's own ``give_up``, asked
every 50 ms, returns an error. The lock ``_undecided`` is taken once, so that only the first of them decides the
result.

No deadlock is possible: ``_guard`` is held only for bookkeeping, never during a call or a wait, and the inbox has no
bound. A call that was given up may occupy its courier for ever; later calls of the same caller queue behind it, and
``lose`` or their own ``give_up`` frees them too. A courier ends when its caller's thread ends or
:meth:`ReleasableCalls.close` is called. All couriers are daemon threads, so a stuck one does not keep the process
alive. Nothing here is on disk.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from stepguard.coordination.process_exit import has_threads

# How often `give_up` is asked.
_LOOK_SECS = 0.05
# How long an interrupted caller waits for its call to end, so that the effect of the call is complete.
_INTERRUPTED_SECS = 5.0

GiveUp = Callable[[], BaseException | None]


class _Call:
    """One call, under way on a courier's thread. It ends once: with its result, or by being given up."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._undecided = threading.Lock()
        self._ended = threading.Lock()
        self._ended.acquire()
        self._has_ended = False
        self._value: Any = None
        self._error: BaseException | None = None
        self.is_left_behind = False

    def make(self) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = self._function()
        except BaseException as raised:  # noqa: BLE001 - a thread's edge: the caller raises it
            error = raised
        self._end(value, error)

    def give_up(self, error: BaseException) -> None:
        self.is_left_behind = True
        self._end(None, error)

    def wait(self, give_up: GiveUp | None) -> None:
        if give_up is None:
            self._ended.acquire()
            return
        while not self._ended.acquire(timeout=_LOOK_SECS):
            error = give_up()
            if error is not None:
                self.give_up(error)

    def wait_at_most(self, secs: float) -> None:
        # The signal may have come after the end: the interrupted wait has then taken the lock, which nobody releases.
        if not self._has_ended:
            self._ended.acquire(timeout=secs)

    def result(self) -> Any:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # The error's traceback holds this frame, so a name of this frame that holds the error makes a cycle.
                del error, self
        return self._value

    def _end(self, value: Any, error: BaseException | None) -> None:
        if self._undecided.acquire(blocking=False):
            self._value, self._error = value, error
            self._has_ended = True
            self._ended.release()


class _Courier:
    """A thread that makes the calls of one other thread. It ends with that thread, or when the calls are closed."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        # The thread refers to the inbox only, so that the courier is collected when its caller's thread ends.
        threading.Thread(target=_serve, args=(self._inbox, context), name="stepguard-run", daemon=True).start()

    def take(self, call: _Call) -> None:
        self._inbox.put(call)

    def end(self) -> None:
        self._inbox.put(None)

    __del__ = end


def _serve(inbox: queue.SimpleQueue[_Call | None], context: Callable[[], AbstractContextManager[Any]]) -> None:
    with context():
        while (call := inbox.get()) is not None:
            call.make()
            del call


class ReleasableCalls:
    """Makes calls on threads of its own, one for each calling thread, so that no caller can be stuck.

    A call into TensorFlow's runtime cannot be interrupted: if a server is silent (stopped, or cut off), the call never
    returns. The caller therefore waits here, where :meth:`lose` can free it; the call itself is left behind. Handing a
    call over and back costs about 15 us.

    Each courier thread enters ``context`` once.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._context = context
        self._pid = os.getpid()
        self._callers = threading.local()
        self._guard = threading.Lock()
        self._under_way: set[_Call] = set()
        self._couriers: weakref.WeakSet[_Courier] = weakref.WeakSet()
        self._lost: BaseException | None = None
        self.left_behind = False
        """Whether a call was given up; it may still be under way."""

    @property
    def lost(self) -> BaseException | None:
        """The error of the first call of :meth:`lose`; ``None`` before."""
        return self._lost

    def call(self, function: Callable[[], Any], give_up: GiveUp | None = None) -> Any:
        """Return ``function()``, or raise what it raises. Any thread.

        ``give_up`` is asked every 50 ms; if it returns an error, the wait ends and that error is raised.

        Where no courier runs (in a forked child, and while the process exits) the caller itself makes the call.
        """
        if not has_threads(self._pid):
            return function()
        call = _Call(function)
        with self._guard:
            if self._lost is not None:
                raise self._lost
            courier = self._courier()
            if courier is not None:
                self._under_way.add(call)
                courier.take(call)
        if courier is None:
            return function()
        is_interrupted = True
        try:
            call.wait(give_up)
            is_interrupted = False
        finally:
            if is_interrupted:
                # A signal handler raised during the wait. Without a courier it would have run after the call.
                call.wait_at_most(_INTERRUPTED_SECS)
            with self._guard:
                self.left_behind = self.left_behind or call.is_left_behind
                self._under_way.discard(call)
        return call.result()

    def _courier(self) -> _Courier | None:
        """The courier of this thread. ``None`` if Python starts no thread, as some versions while the process exits."""
        courier: _Courier | None = getattr(self._callers, "courier", None)
        if courier is None:
            try:
                courier = self._callers.courier = _Courier(self._context)
            except RuntimeError:
                return None
            self._couriers.add(courier)
        return courier

    def close(self) -> None:
        """End each courier once its calls are done. A later call gets a new courier."""
        with self._guard:
            for courier in list(self._couriers):
                courier.end()
            self._couriers.clear()
            self._callers = threading.local()

    def lose(self, error: BaseException) -> None:
        """End every call under way with ``error``, and refuse every later call with it. Any thread."""
        with self._guard:
            if self._lost is not None:
                return
            self._lost = error
            stuck = list(self._under_way)
        for call in stuck:
            call.give_up(error)
