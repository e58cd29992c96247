"""LooperThread: call a function every n seconds until the coordinator stops.

The protocol: the thread waits for its next tick inside `Coordinator.wait_for_stop`, so it is woken by the time or by a
stop request, whichever comes first. It waits for nothing else and holds no lock while it calls the function, so it
cannot deadlock with the thread that joins it; a call that blocks delays that thread by the grace period at most. The
thread is a daemon: a kill, or the end of the process, leaves nothing of its own behind.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.options.checks import check_seconds

__all__ = ["LooperThread"]


class LooperThread(threading.Thread):
    """A daemon thread that calls `target`, or an overridden `run_loop`, on a timer until the coordinator stops.

    The first call is made as soon as the thread starts, the others at multiples of the interval after it. Ticks that
    pass during a call are skipped, never made up for in a burst: the next call waits for the next tick. A stop request
    ends the wait at once; it does not interrupt a call.

    The constructor registers the thread with the coordinator. An exception ends the thread and is passed to
    `Coordinator.request_stop`.

    Args:
      coord: the coordinator that asks the thread to stop, and receives its exception.
      timer_interval_secs: seconds from one call to the next. None or 0 calls without a pause.
      target: the function to call. None is for subclasses that override `run_loop`.
      args: the positional arguments of the function.
      kwargs: the keyword arguments of the function.
      name: the name of the thread; by default it contains the name of the function.
      clock: returns monotonic seconds; for tests.

    Raises:
      ValueError: if `coord` is not a Coordinator, the interval is negative or not finite, or `args` or `kwargs` are
        given without a `target`.
      TypeError: if the interval is not a number, `target` is not callable, or `args` or `kwargs` have the wrong type.
    """

    def __init__(
        self,
        coord: Coordinator,
        timer_interval_secs: float | None,
        target: Callable[..., object] | None = None,
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(coord, Coordinator):
            raise ValueError(f"coord must be a stepguard Coordinator, got {coord!r}")
        if target is None and (args or kwargs):
            raise ValueError("args and kwargs are for a target, and target is None")
        if target is not None and not callable(target):
            raise TypeError(f"target must be callable, got {target!r}")
        called = getattr(target, "__name__", None) or type(self if target is None else target).__name__
        super().__init__(name=name or f"stepguard-loop-{called}", daemon=True)
        self._coord = coord
        self._interval_secs = _interval_secs(timer_interval_secs)
        # Other names, because Thread itself has _target, _args and _kwargs.
        self._call = target
        self._call_args = tuple(args or ())
        self._call_kwargs = dict(kwargs or {})
        self._clock = clock
        self._skipped_ticks = 0
        coord.register_thread(self)

    @staticmethod
    def loop(
        coord: Coordinator,
        timer_interval_secs: float | None,
        target: Callable[..., object],
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> LooperThread:
        """Makes a LooperThread, starts it and returns it. Arguments and errors are the constructor's."""
        looper = LooperThread(coord, timer_interval_secs, target, args, kwargs, name=name, clock=clock)
        looper.start()
        return looper

    @property
    def skipped_ticks(self) -> int:
        """The number of ticks without a call, because an earlier call was still running. Any thread may read it."""
        return self._skipped_ticks

    def run(self) -> None:
        """Calls `start_loop`, then `run_loop` at every tick, then `stop_loop`. `start` runs this in the thread."""
        with self._coord.stop_on_exception():
            self.start_loop()
            if self._interval_secs:
                self._run_on_ticks(self._interval_secs)
            else:
                while not self._coord.should_stop():
                    self.run_loop()
            self.stop_loop()

    def start_loop(self) -> None:
        """Called once, in the thread, before the first `run_loop`. Does nothing; for subclasses."""

    def run_loop(self) -> None:
        """Called at every tick, in the thread. Calls `target`, if there is one."""
        if self._call is not None:
            self._call(*self._call_args, **self._call_kwargs)

    def stop_loop(self) -> None:
        """Called once, in the thread, when it stops without an error. Does nothing; for subclasses."""

    def _run_on_ticks(self, interval_secs: float) -> None:
        started_at = self._clock()
        tick = 0
        while not self._wait_until(started_at + tick * interval_secs):
            self.run_loop()
            # Rounded up: a tick that is due at this very moment is not missed.
            next_due = math.ceil((self._clock() - started_at) / interval_secs)
            # At least the next tick: after rounding or a short call, the same tick must not run twice.
            self._skipped_ticks += max(next_due - (tick + 1), 0)
            tick = max(next_due, tick + 1)

    def _wait_until(self, due_at: float) -> bool:
        """True if a stop was requested before that time."""
        while not self._coord.should_stop():
            left_secs = due_at - self._clock()
            if left_secs <= 0:
                return False
            self._coord.wait_for_stop(left_secs)
        return True


def _interval_secs(secs: Any) -> float | None:
    check_seconds("timer_interval_secs", secs, is_finite=True, or_none=True)
    return None if secs is None else float(secs)
