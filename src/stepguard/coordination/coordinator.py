"""Coordinator: one stop flag, the first error, and the threads that stop together.

The semantics are those that TensorFlow documents for `tf.train.Coordinator
<https://www.tensorflow.org/api_docs/python/tf/train/Coordinator>`_; docs/ lists where this one departs.

The protocol: any thread requests the stop; the others poll `should_stop` or block in `wait_for_stop`; one thread,
usually the main thread, blocks in `join` until they have ended. Each thread in `wait_for_stop` blocks on a lock of its
own, which it has put into `_waiters`; `request_stop` pops and releases every lock there, so each is released exactly
once. A waiter checks the flag again after it has put its lock there, so that it cannot miss a request made just before.
`join` polls the threads: every `_LOOK_SECS` until a stop is requested, then at least once every `_LONGEST_LOOK_SECS`.

No deadlock is possible, because the class takes no lock that another thread waits for. Its methods may run in a signal
handler, and a handler runs in the middle of a method of the main thread: a lock that the interrupted method held would
never be released (`threading.Event` has such a lock). Instead, every change of state is one atomic operation (an
assignment, a list.append, a set.pop). An error is recorded before the flag is set, so a thread that sees the flag also
sees the error; and `join` sets `joined` before it reads the errors, whereas `request_stop` records its error before it
reads `joined`, so at least one of the two raises the error. Nothing here is on disk: a kill leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from stepguard.errors import StopRequested, add_note
from stepguard.options.checks import check_seconds
from stepguard.words import logger

__all__ = ["Coordinator"]

_log = logger(__name__)

# The shortest grace period of a join: even a thread that waits for the stop needs a moment to wake up and end.
_SHORTEST_LOOK_SECS = 0.05
# The time between two looks of a join at the threads, before a stop was requested.
_LOOK_SECS = 0.05
# The longest time between two checks of a join whether a running thread has entered `not_joined`.
_LONGEST_LOOK_SECS = 0.2
# A note is one readable line; the log has the whole text with its traceback.
_NOTE_CHARS = 500


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error as it was reported: with its traceback at that time, and the name of the reporting thread."""

    error: BaseException
    traceback: TracebackType | None
    thread_name: str

    def raise_error(self) -> None:
        # Raising adds frames to the traceback. Reset it to the reported one, so that it does not grow at each raise.
        error = self.error.with_traceback(self.traceback)
        try:
            raise error
        finally:
            # The traceback now refers to this frame: drop the frame's references, or they form a cycle with the error.
            del error, self


@dataclass(slots=True)
class _Stop:
    """All state that clear_stop resets, in one object, so that one assignment replaces it."""

    requested_at: float | None = None
    # Who asked for the stop, if it was asked for; see `Coordinator.stop_reason`.
    reason: str | None = None
    main_thread_was_told: bool = False
    joined: bool = False
    failures: list[_Failure] = field(default_factory=list)

    def record(self, failure: _Failure) -> None:
        """Keeps the failure. The first one appended is the one to raise; later ones become its notes."""
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
    """Stops a set of threads together, and raises their first error in the thread that joins them.

    Threads ask `should_stop()` or wait in `wait_for_stop()`; any of them ends the run with `request_stop()`; the
    thread that started them calls `join()`, which raises the first error::

        coord = Coordinator()
        threads = [threading.Thread(target=work, args=(coord,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        coord.join(threads)

    Any thread may call any method. A signal handler may call any method but `join`, which waits.

    Args:
      clean_stop_exception_types: exceptions that request a stop and are not errors, such as "end of input".
      late_noise_types: exceptions that are not errors after a stop request, because they are its consequence, such as
        "cancelled". Before a stop request they are errors like any other.

    Raises:
      TypeError: if one of the arguments is not an iterable of exception types.
    """

    def __init__(
        self,
        clean_stop_exception_types: Iterable[type[BaseException]] | None = (),
        late_noise_types: Iterable[type[BaseException]] = (),
    ) -> None:
        self._clean_types = _exception_types("clean_stop_exception_types", clean_stop_exception_types)
        self._noise_types = _exception_types("late_noise_types", late_noise_types)
        self._stop = _Stop()
        # One lock for each thread in wait_for_stop. request_stop pops a lock before it releases it: once each.
        self._waiters: set[threading.Lock] = set()
        # Keyed by id, because a Thread subclass may define its own __eq__.
        self._registered_threads: dict[int, threading.Thread] = {}
        # The idents of the threads inside `not_joined`. A thread is inside at most once.
        self._not_joined: set[int] = set()

    def should_stop(self) -> bool:
        """True once a stop was requested. Cheap enough to call at every step."""
        stop = self._stop
        if stop.requested_at is None:
            return False
        # The question counts as the main thread's own. Internal code in the main thread reads `stop_requested` instead.
        if threading.current_thread() is threading.main_thread():
            stop.main_thread_was_told = True
        return True

    @property
    def stop_reason(self) -> str | None:
        """Who asked for the stop before the run was over or had failed: "request_stop", or what `ask_stop` was told."""
        return self._stop.reason

    @property
    def stop_requested(self) -> bool:
        """True once a stop was requested. Unlike `should_stop`, reading it does not count as having told a thread."""
        return self._stop.requested_at is not None

    def main_thread_was_told(self) -> bool:
        """Whether `should_stop` has returned True in the main thread, which then ends the run in its own way."""
        return self._stop.main_thread_was_told

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        """Waits until a stop is requested, or for `timeout` seconds. True if a stop was requested."""
        if self.should_stop():
            return True
        if timeout is not None and timeout <= 0:
            return False
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.add(waiter)
        try:
            # Check again now that request_stop can see the waiter: a request before this line did not release it.
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
        """Asks all threads to stop; `ex` is the error that makes it necessary. Returns at once.

        `join` and `raise_requested_exception` raise the first error, even if the stop was first requested without an
        error or with a clean-stop type. Different errors after the first are attached to it as notes.

        Args:
          ex: an exception, or the tuple of `sys.exc_info()`.

        Raises:
          ex itself: if `join` had already finished and can no longer raise it; never a clean-stop type.
          TypeError: if `ex` is neither. The stop is requested all the same, with that TypeError as its error.
        """
        stop = self._stop
        try:
            failure = _failure(ex)
        except TypeError as error:
            self._request_stop(stop, _Failure(error, error.__traceback__, threading.current_thread().name))
            raise
        reason = "request_stop" if failure is None else None
        if failure is not None and self._is_harmless(failure.error, after_stop=stop.requested_at is not None):
            failure = None
        self._request_stop(stop, failure, reason)

    def ask_stop(self, reason: str) -> None:
        """Like `request_stop` without an error, on behalf of ``reason``, such as "sigterm"."""
        self._request_stop(self._stop, None, reason)

    def end(self) -> None:
        """Asks all threads to stop because the run is over. This does not count as a requested stop."""
        self._request_stop(self._stop, None)

    def report(self, error: BaseException) -> None:
        """Like `request_stop`, but never raises `error` itself: for the edge of a thread, where nothing catches it."""
        try:
            self.request_stop(error)
        except BaseException as raised:
            # After a join, request_stop also raises in the reporting thread. The next join raises the error anyway.
            if raised is not error:
                raise

    def clear_stop(self) -> None:
        """Resets the coordinator: no stop requested, no error, not joined. Registered threads stay registered."""
        self._stop = _Stop()

    @contextlib.contextmanager
    def stop_on_exception(self) -> Iterator[None]:
        """`with coord.stop_on_exception():` passes an exception of the block to `request_stop`, and ends the block.

        An `Exception` is swallowed, and raised later by `join`. Other exceptions (KeyboardInterrupt, SystemExit,
        GeneratorExit) are reported and propagate. After `join` has finished, everything but a clean stop propagates.
        """
        try:
            yield
        except BaseException as error:
            self.request_stop(error)
            if not isinstance(error, Exception):
                raise

    def register_thread(self, thread: threading.Thread) -> None:
        """Adds a thread to those that `join` waits for. The thread may be started later.

        Raises:
          TypeError: if `thread` is not a thread.
        """
        _check_thread(thread)
        self._registered_threads[id(thread)] = thread

    @contextlib.contextmanager
    def not_joined(self) -> Iterator[None]:
        """A context in which `join` does not wait for the calling thread after a stop, since it waits for the end."""
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

        Waits for `threads` and for all registered threads, including those registered during the wait; not for threads
        that were never started, nor for the calling thread. Returns as soon as the last thread has ended. Without a
        stop request, waits without limit; after one, for `stop_grace_period_secs` from the request or from this call,
        whichever is later. May be called again, from any thread, and then raises the same error.

        Args:
          threads: started threads to wait for, in addition to the registered ones.
          stop_grace_period_secs: seconds that the threads have to end after the request.
          ignore_live_threads: log a warning about threads that did not end in time, instead of raising.

        Raises:
          the first error: with a note for each later error, and a note for the threads that did not end in time.
          RuntimeError: if no error was reported and threads did not end in time. It names them.
          TypeError, ValueError: for invalid arguments, before any waiting.
        """
        # Even a thread that waits for the stop needs a moment to wake up and end.
        grace_secs = max(_grace_secs(stop_grace_period_secs), _SHORTEST_LOOK_SECS)
        live = self._wait_for_threads(_thread_list(threads), grace_secs, time.monotonic())
        stop = self._stop
        # Set `joined`, then read the errors; request_stop does the reverse, so at least one of them raises an error.
        self._set_joined(stop)
        for thread in list(self._registered_threads.values()):
            if thread.ident is not None and not thread.is_alive():
                self._registered_threads.pop(id(thread), None)
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
            # The traceback of our error now refers to this frame: it must not keep the coordinator alive in a cycle.
            del self

    def _set_joined(self, stop: _Stop) -> None:
        stop.joined = True

    @property
    def joined(self) -> bool:
        """True once a `join` has finished, with or without an error."""
        return self._stop.joined

    @property
    def failed(self) -> bool:
        """True once an error was reported."""
        return bool(self._stop.failures)

    @property
    def first_error(self) -> BaseException | None:
        """The error that :meth:`join` raises; ``None`` if none was reported."""
        failures = self._stop.failures
        return failures[0].error if failures else None

    def raise_requested_exception(self) -> None:
        """Raises the first reported error, if any, with the traceback it had when reported. May be called again."""
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
        # StopRequested only passes on a stop that was requested before.
        if isinstance(error, (StopRequested, *self._clean_types)):
            return True
        if after_stop and isinstance(error, self._noise_types):
            _log.debug("%s after a stop request: taken for its consequence", _one_line(error))
            return True
        return False

    def _request_stop(self, stop: _Stop, failure: _Failure | None, reason: str | None = None) -> None:
        # Error first, flag second: a thread that sees the flag also sees the error.
        if failure is not None:
            stop.record(failure)
        if stop.requested_at is None:
            stop.reason = reason
            stop.requested_at = time.monotonic()
        # suppress: another thread, or a signal handler, may pop the last waiter between our check and our pop.
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
            union = {id(thread): thread for thread in [*given, *list(self._registered_threads.values())]}
            live = [thread for thread in union.values() if thread is not me and self._is_awaited(thread)]
            if not live:
                return []
            left_secs = self._grace_left_secs(grace_secs, began)
            if left_secs <= 0:
                return live
            if self._stop.requested_at is None:
                # A stop starts the grace period. Like TensorFlow's, a join before it looks at the threads now and then:
                # its own tests rely on a moment more for threads that nobody has registered.
                self.wait_for_stop(min(left_secs, _LOOK_SECS))
                continue
            # Any one will do, as all have to end. Wait only briefly, because the thread may enter `not_joined`.
            live[0].join(min(left_secs, _LONGEST_LOOK_SECS))

    def _is_awaited(self, thread: threading.Thread) -> bool:
        return thread.is_alive() and not (self.stop_requested and thread.ident in self._not_joined)

    def _grace_left_secs(self, grace_secs: float, began: float) -> float:
        requested_at = self._stop.requested_at
        if requested_at is None:
            # A stop is requested now at the earliest, so the deadline is at least one whole grace period away. The
            # request need not wake this thread, which checks again by then.
            return max(grace_secs, _SHORTEST_LOOK_SECS)
        return max(requested_at, began) + grace_secs - time.monotonic()


def _failure(ex: object) -> _Failure | None:
    """The argument of request_stop as a failure, or None if it holds none. TypeError if it is not an exception."""
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
    """Adds the note unless the error already has it: a second join adds the same notes."""
    if note in getattr(error, "__notes__", ()):
        return
    try:
        add_note(error, note)
    except (AttributeError, TypeError):
        # A frozen exception accepts no notes.
        _log.error("%s: %s", _one_line(error), note)


def _names(threads: Iterable[threading.Thread]) -> str:
    return ", ".join(getattr(thread, "name", None) or repr(thread) for thread in threads)


def _check_thread(thread: object) -> None:
    # No isinstance check: TensorFlow accepts any object with these two methods, such as a multiprocessing.Process.
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
    # The contract sets no lower bound: a negative grace period counts as 0.
    check_seconds("stop_grace_period_secs", secs, least=-math.inf)
    return float(secs)


def _exception_types(name: str, types: object) -> tuple[type[BaseException], ...]:
    if types is None:
        return ()
    checked: tuple[Any, ...] = tuple(types) if isinstance(types, Iterable) else (None,)
    if not all(isinstance(each, type) and issubclass(each, BaseException) for each in checked):
        raise TypeError(f"{name} must be a tuple of exception types, got {types!r}")
    return checked
