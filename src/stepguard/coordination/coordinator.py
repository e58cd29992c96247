"""Coordinator: one stop flag, the first error, and the threads that stop together.

The semantics are those that TensorFlow documents for `tf.train.Coordinator
<https://www.tensorflow.org/api_docs/python/tf/train/Coordinator>`_; docs/ lists where this one departs.

The class takes no lock. Its methods may be called from any thread and from a signal handler, and a handler runs
in the middle of whatever the main thread was doing: a lock that the interrupted method holds would never be released,
and `threading.Event` has such a lock. Instead, every change of state is one atomic operation (an assignment, a
list.append, a set.pop), ordered so that whoever looks in between loses nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from stepguard.errors import StopRequested, add_note
from stepguard.options import check_seconds

__all__ = ["Coordinator"]

_log = logging.getLogger(__name__)

# How often a join with a shorter grace period than this looks for a stop request.
_SHORTEST_LOOK_SECS = 0.05
# How often it looks whether a thread that goes on has come to where it is not waited for.
_LONGEST_LOOK_SECS = 0.2
# A note is one line to read; the log has the whole text, with its traceback.
_NOTE_CHARS = 500


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error as it was reported: the traceback it had then, and the thread that reported it."""

    error: BaseException
    traceback: TracebackType | None
    thread_name: str

    def raise_error(self) -> None:
        # Raising adds frames to the traceback; starting from the reported one keeps it from growing at each raise.
        error = self.error.with_traceback(self.traceback)
        try:
            raise error
        finally:
            # This frame is in the traceback now: what it still names would be in a cycle with the error.
            del error, self


@dataclass(slots=True)
class _Stop:
    """All that clear_stop resets, in one object, so that it is replaced in one assignment."""

    requested_at: float | None = None
    was_asked: bool = False
    main_thread_was_told: bool = False
    joined: bool = False
    failures: list[_Failure] = field(default_factory=list)

    def record(self, failure: _Failure) -> None:
        """Keeps the failure: the first to be appended is the one that is raised, the others become its notes."""
        self.failures.append(failure)
        first = self.failures[0]
        if first is failure:
            _log.info("%s in thread %s requests a stop", _one_line(failure.error), failure.thread_name)
        elif first.error is not failure.error:
            _add_note(first.error, f"later error: {_one_line(failure.error)} (in thread {failure.thread_name})")
            _log.info(
                "later error in thread %s, after %s",
                failure.thread_name,
                _one_line(first.error),
                exc_info=(type(failure.error), failure.error, failure.traceback),
            )


class Coordinator:
    """Stops a set of threads together, and brings their first error to whoever joins them.

    Threads ask `should_stop()` or wait in `wait_for_stop()`; any of them ends the run with `request_stop()`; the
    thread that started them calls `join()`, which raises what went wrong::

        coord = Coordinator()
        threads = [threading.Thread(target=work, args=(coord,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        coord.join(threads)

    Any thread may call any method, and so may a signal handler (`join` excepted: it waits).

    Args:
      clean_stop_exception_types: exceptions that ask for a stop and are no error, such as "end of input".
      late_noise_types: exceptions that are no error once a stop was requested, being only its consequence, such as
        "cancelled". Before a stop, they are errors like any other.

    Raises:
      TypeError: if one of the two is not made of exception types.
    """

    def __init__(
        self,
        clean_stop_exception_types: Iterable[type[BaseException]] | None = (),
        late_noise_types: Iterable[type[BaseException]] = (),
    ) -> None:
        self._clean_types = _exception_types("clean_stop_exception_types", clean_stop_exception_types)
        self._noise_types = _exception_types("late_noise_types", late_noise_types)
        self._stop = _Stop()
        # Locked by whoever waits in wait_for_stop, released by request_stop: each is popped, so released, once.
        self._waiters: set[threading.Lock] = set()
        # By id: a Thread subclass may define an __eq__ of its own.
        self._registered: dict[int, threading.Thread] = {}
        # Threads, by ident, inside `not_joined`: a thread is in no more than one.
        self._not_joined: set[int] = set()

    def should_stop(self) -> bool:
        """True once a stop was requested. Cheap: made to be asked at every step."""
        stop = self._stop
        if stop.requested_at is None:
            return False
        # Who only looks, to do something about it for the main thread, has to look at stop_requested.
        if threading.current_thread() is threading.main_thread():
            stop.main_thread_was_told = True
        return True

    @property
    def stop_was_asked(self) -> bool:
        """Whether somebody has called `request_stop` without an error before the run was over or had failed."""
        return self._stop.was_asked

    @property
    def stop_requested(self) -> bool:
        """The same, for a look that does not count as the main thread's question."""
        return self._stop.requested_at is not None

    def main_thread_was_told(self) -> bool:
        """Whether a stop was requested, and the main thread has asked for it: it ends by itself, in its own way."""
        return self._stop.main_thread_was_told

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        """Waits until a stop is requested, or for `timeout` seconds. True if it was requested."""
        if self.should_stop():
            return True
        if timeout is not None and timeout <= 0:
            return False
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.add(waiter)
        try:
            # Asked again now that request_stop can see the waiter: a stop before this line released nobody.
            if self.should_stop():
                return True
            waiter.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
            return self.should_stop()
        finally:
            self._waiters.discard(waiter)

    def request_stop(
        self,
        ex: BaseException
        | tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None]
        | None = None,
    ) -> None:
        """Asks all threads to stop and, with `ex`, says why. Returns at once.

        The first error is the one that `join` and `raise_requested_exception` raise, also when the stop was first
        requested without one, or with a clean-stop type. Different errors after it are attached to it as notes.

        Args:
          ex: an exception, being handled or not, or the tuple of `sys.exc_info()`.

        Raises:
          ex itself: if `join` had finished and so may not raise it any more; never a clean-stop type.
          TypeError: if `ex` is neither. The stop is requested all the same, with that TypeError as its error.
        """
        stop = self._stop
        try:
            failure = _failure(ex)
        except TypeError as error:
            self._request_stop(stop, _Failure(error, error.__traceback__, threading.current_thread().name))
            raise
        was_asked = failure is None
        if failure is not None and self._is_harmless(failure.error, after_stop=stop.requested_at is not None):
            failure = None
        self._request_stop(stop, failure, was_asked=was_asked)

    def end(self) -> None:
        """Asks all threads to stop because the run is over, which nobody has asked for."""
        self._request_stop(self._stop, None)

    def report(self, error: BaseException) -> None:
        """Like `request_stop`, for a thread's edge, where nobody could catch what it raises: `error` itself is not."""
        try:
            self.request_stop(error)
        except BaseException as raised:
            # After a join it raises in the thread that reports as well; whoever joins next is told all the same.
            if raised is not error:
                raise

    def clear_stop(self) -> None:
        """Makes the coordinator as new: no stop requested, no error, not joined. Registered threads stay so."""
        self._stop = _Stop()

    @contextlib.contextmanager
    def stop_on_exception(self) -> Iterator[None]:
        """`with coord.stop_on_exception():` passes an exception of the block to `request_stop`, and ends the block.

        `Exception` ends there, to be raised by `join`. What is none (KeyboardInterrupt, SystemExit, GeneratorExit)
        is reported too, and goes on. After `join` had finished, everything but a clean stop goes on.
        """
        try:
            yield
        except BaseException as error:
            self.request_stop(error)
            if not isinstance(error, Exception):
                raise

    def register_thread(self, thread: threading.Thread) -> None:
        """Adds a thread to those that `join` waits for. It may be started later.

        Raises:
          TypeError: if `thread` is not a thread.
        """
        _check_thread(thread)
        self._registered[id(thread)] = thread

    @contextlib.contextmanager
    def not_joined(self) -> Iterator[None]:
        """Inside it the calling thread is not one that `join` waits for after a stop: it waits for what comes after."""
        ident = threading.get_ident()
        self._not_joined.add(ident)
        try:
            yield
        finally:
            self._not_joined.discard(ident)

    def join(
        self,
        threads: Iterable[threading.Thread] | None = None,
        stop_grace_period_secs: float = 120,
        ignore_live_threads: bool = False,
    ) -> None:
        """Waits until all threads have ended, then raises the first error that was reported, if any.

        Waits for `threads` and for the registered ones, those registered meanwhile included; not for threads that
        were never started, nor for the calling thread. Returns as soon as the last has ended. While no stop is
        requested, waits without limit; once it is, for `stop_grace_period_secs` from then, or from this call if that
        came later. May be called again, from any thread; raises the same error then.

        Args:
          threads: started threads to wait for, besides the registered ones.
          stop_grace_period_secs: seconds that the threads have to end, from the request on.
          ignore_live_threads: log a warning about threads that did not end in time, in place of the error.

        Raises:
          the first error: with a note for each later one, and one for the threads that did not end in time.
          RuntimeError: if no error was reported and threads did not end in time. It names them.
          TypeError, ValueError: for arguments that are not as above; before any waiting.
        """
        # A thread that waits for the stop still needs a moment to wake up.
        grace_secs = max(_grace_secs(stop_grace_period_secs), _SHORTEST_LOOK_SECS)
        live = self._wait_for_threads(_thread_list(threads), grace_secs, time.monotonic())
        stop = self._stop
        # Joined first, errors read second: request_stop does it the other way round, and so one of both sees it.
        self._set_joined(stop)
        for thread in list(self._registered.values()):
            if thread.ident is not None and not thread.is_alive():
                self._registered.pop(id(thread), None)
        if live:
            report = f"threads still running {grace_secs:g} s after the stop was requested: {_names(live)}"
            if ignore_live_threads:
                _log.warning(report)
            elif stop.failures:
                _add_note(stop.failures[0].error, report)
            else:
                raise RuntimeError(f"{report}; let them ask should_stop() more often, or give them more time")
        del stop, live
        try:
            self.raise_requested_exception()
        finally:
            # This frame is in the traceback of our error now: it must not keep us alive in a cycle.
            del self

    def _set_joined(self, stop: _Stop) -> None:
        stop.joined = True

    @property
    def joined(self) -> bool:
        """True once a `join` has finished, also with an error."""
        return self._stop.joined

    @property
    def failed(self) -> bool:
        """True once an error was reported."""
        return bool(self._stop.failures)

    def raise_requested_exception(self) -> None:
        """Raises the first error that was reported, if any, at each call, with the traceback it was reported with."""
        failures = self._stop.failures
        if not failures:
            return
        first = failures[0]
        del failures, self
        try:
            first.raise_error()
        finally:
            del first

    def _is_harmless(self, error: BaseException, *, after_stop: bool) -> bool:
        # StopRequested only carries a request that was made before it.
        if isinstance(error, (StopRequested, *self._clean_types)):
            return True
        if after_stop and isinstance(error, self._noise_types):
            _log.debug("%s after a stop request: taken for its consequence", _one_line(error))
            return True
        return False

    def _request_stop(self, stop: _Stop, failure: _Failure | None, *, was_asked: bool = False) -> None:
        # Error first, flag second: who sees the flag can rely on the error being there.
        if failure is not None:
            stop.record(failure)
        if stop.requested_at is None:
            stop.was_asked = was_asked
            stop.requested_at = time.monotonic()
        # suppress: another thread, or a signal handler, may pop the last one between our look and our pop.
        with contextlib.suppress(KeyError):
            while self._waiters:
                self._waiters.pop().release()
        if failure is not None and stop.joined:
            failure.raise_error()

    def _wait_for_threads(
        self, given: list[threading.Thread], grace_secs: float, began: float
    ) -> list[threading.Thread]:
        """The threads that are still alive at the end of the grace period."""
        me = threading.current_thread()
        while True:
            union = {id(thread): thread for thread in [*given, *list(self._registered.values())]}
            live = [thread for thread in union.values() if thread is not me and self._is_awaited(thread)]
            if not live:
                return []
            left_secs = self._grace_left_secs(grace_secs, began)
            if left_secs <= 0:
                return live
            # All have to end, so it is no matter which we wait for; not for long, as it may come to `not_joined`.
            live[0].join(min(left_secs, _LONGEST_LOOK_SECS))

    def _is_awaited(self, thread: threading.Thread) -> bool:
        return thread.is_alive() and not (self.stop_requested and thread.ident in self._not_joined)

    def _grace_left_secs(self, grace_secs: float, began: float) -> float:
        requested_at = self._stop.requested_at
        if requested_at is None:
            # Requested now at the earliest, so no deadline can fall before a whole grace period has passed: no need
            # to be woken by the request, only to look again then.
            return max(grace_secs, _SHORTEST_LOOK_SECS)
        return max(requested_at, began) + grace_secs - time.monotonic()


def _failure(ex: object) -> _Failure | None:
    """What request_stop was given, as a failure, or None for nothing. TypeError if it is no exception."""
    if ex is None or ex == (None, None, None):
        return None
    error, trace = ex, None
    if isinstance(ex, tuple) and len(ex) == 3:
        _, error, trace = ex
    if not isinstance(error, BaseException) or not isinstance(trace, TracebackType | None):
        raise TypeError(f"ex must be an exception, a sys.exc_info() tuple or None, got {ex!r}")
    return _Failure(error, trace or error.__traceback__, threading.current_thread().name)


def _one_line(error: BaseException) -> str:
    line = " ".join("".join(traceback.format_exception_only(type(error), error)).split())
    return line if len(line) <= _NOTE_CHARS else line[:_NOTE_CHARS] + " ..."


def _add_note(error: BaseException, note: str) -> None:
    """Adds the note unless the error has it already, as at the second of two joins."""
    if note in getattr(error, "__notes__", ()):
        return
    try:
        add_note(error, note)
    except (AttributeError, TypeError):
        # A frozen exception takes no notes.
        _log.error("%s: %s", _one_line(error), note)


def _names(threads: Iterable[threading.Thread]) -> str:
    return ", ".join(getattr(thread, "name", None) or repr(thread) for thread in threads)


def _check_thread(thread: object) -> None:
    # Not isinstance: TensorFlow's takes whatever has these two, a multiprocessing.Process say.
    if not (callable(getattr(thread, "is_alive", None)) and callable(getattr(thread, "join", None))):
        raise TypeError(f"expected a thread, got {thread!r}")


def _thread_list(threads: object) -> list[threading.Thread]:
    if threads is None:
        return []
    if not isinstance(threads, Iterable):
        raise TypeError(f"threads must be a list of threads, got {threads!r}")
    checked = list(threads)
    for thread in checked:
        _check_thread(thread)
    return checked


def _grace_secs(secs: Any) -> float:
    # Less than none is none: the contract sets no bound.
    check_seconds("stop_grace_period_secs", secs, least=-math.inf)
    return float(secs)


def _exception_types(name: str, types: object) -> tuple[type[BaseException], ...]:
    if types is None:
        return ()
    checked: tuple[Any, ...] = tuple(types) if isinstance(types, Iterable) else (None,)
    if not all(isinstance(each, type) and issubclass(each, BaseException) for each in checked):
        raise TypeError(f"{name} must be a tuple of exception types, got {types!r}")
    return checked
