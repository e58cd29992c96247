"""Calls into a server that may never answer, made so that the caller can be freed."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

# How often a caller that may give up looks whether it should.
_LOOK_SECS = 0.05
# How long a call that a signal has interrupted may take to end: what it was doing is then known to be done.
_INTERRUPTED_SECS = 5.0

GiveUp = Callable[[], BaseException | None]


class _Call:
    """One call, under way on a courier's thread. It ends once: with what it returned, or by being given up."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._undecided = threading.Lock()
        self._ended = threading.Lock()
        self._ended.acquire()
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
        self._ended.acquire(timeout=secs)

    def result(self) -> Any:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # This frame is in the traceback now: what it names would be in a cycle with the error.
                del error, self
        return self._value

    def _end(self, value: Any, error: BaseException | None) -> None:
        if self._undecided.acquire(blocking=False):
            self._value, self._error = value, error
            self._ended.release()


class _Courier:
    """A thread that makes the calls of one other thread. It ends with that thread, or with the carrier."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        # The thread knows the inbox only: the courier itself is collected when its caller's thread ends.
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


class Carrier:
    """Makes calls on threads of its own, one for each calling thread, so that none of the callers can be stuck.

    A call into TensorFlow's runtime cannot be interrupted: with a server that is silent (stopped, or cut off) it stays
    where it is for ever. Its caller waits here instead, and is freed by :meth:`lose`; the call itself is left behind.
    Handing a call over and back costs about 15 us.

    ``context`` is entered once by each of the threads.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._context = context
        self._callers = threading.local()
        self._guard = threading.Lock()
        self._under_way: set[_Call] = set()
        self._couriers: weakref.WeakSet[_Courier] = weakref.WeakSet()
        self._lost: BaseException | None = None
        self.left_behind = False
        """Whether a call was given up, and may still be under way."""

    @property
    def lost(self) -> BaseException | None:
        """What :meth:`lose` was given first."""
        return self._lost

    def call(self, function: Callable[[], Any], give_up: GiveUp | None = None) -> Any:
        """``function()``, from any thread. ``give_up`` is asked again and again, and ends the wait with its error."""
        call = _Call(function)
        with self._guard:
            if self._lost is not None:
                raise self._lost
            self._under_way.add(call)
            courier: _Courier | None = getattr(self._callers, "courier", None)
            if courier is None:
                courier = self._callers.courier = _Courier(self._context)
                self._couriers.add(courier)
            courier.take(call)
        is_interrupted = True
        try:
            call.wait(give_up)
            is_interrupted = False
        finally:
            if is_interrupted:
                # A signal handler raised. Without a courier it would have done so after the call.
                call.wait_at_most(_INTERRUPTED_SECS)
            with self._guard:
                self.left_behind = self.left_behind or call.is_left_behind
                self._under_way.discard(call)
        return call.result()

    def close(self) -> None:
        """End the threads that are idle. A call after this is made by a new one."""
        with self._guard:
            for courier in list(self._couriers):
                courier.end()
            self._couriers.clear()
            self._callers = threading.local()

    def lose(self, error: BaseException) -> None:
        """End every call that is under way, and every later one at once, with ``error``. Any thread."""
        with self._guard:
            if self._lost is not None:
                return
            self._lost = error
            stuck = list(self._under_way)
        for call in stuck:
            call.give_up(error)
