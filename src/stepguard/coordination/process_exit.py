"""The exit of a process in which runs are still open: each is brought to rest before the interpreter ends.

The interpreter ends a daemon thread by force when the thread returns from native code during the exit. C++ takes that
for an unhandled exception, and aborts the process. Therefore one handler of ``atexit`` asks all threads of the open
runs to stop, and waits for them until one deadline.

After that the interpreter runs what is left of the program: the ``__del__`` of its objects, the ``finally`` of its
generators. No other thread runs then, so a wait for one, or for a lock that one holds, would never end, and on Python
3.11 not even the start of a thread returns. What this code may call asks :func:`has_threads` first.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from stepguard.errors import described
from stepguard.words import logger

_log = logger(__name__)

# How long a process that exits waits for the threads of its runs.
_EXIT_SECS = 2.0

RunT = TypeVar("RunT")

# How each run that is open in this process is ended.
_open_runs: weakref.WeakKeyDictionary[Any, Callable[[Any, float], object]] = weakref.WeakKeyDictionary()


def has_threads(
    pid: int,
    _getpid: Callable[[], int] = os.getpid,
    _is_finalizing: Callable[[], bool] = sys.is_finalizing,
) -> bool:
    """Whether the threads that the process ``pid`` has started still run: not in a forked child, which has none of
    them, and not while the interpreter ends, after the handlers of ``atexit``.
    """
    # Bound above, because the names of a module are cleared while the interpreter ends.
    return _getpid() == pid and not _is_finalizing()


def end_with_process(run: RunT, end: Callable[[RunT, float], object]) -> None:
    """Have ``end(run, deadline)`` called when this process exits, unless the run was forgotten or freed until then.

    The deadline is that of :func:`time.monotonic`. A forked child ends no run of its parent,
    because it has none of the threads.
    """
    _watch_exit(os.getpid())
    _open_runs[run] = end


def forget(run: object) -> None:
    """Leave a run alone when the process exits, because it was stopped."""
    _open_runs.pop(run, None)


def call_within(secs: float, function: Callable[[], object]) -> None:
    """Call ``function`` in a thread and wait ``secs`` for it at most: it may be blocked by a disk that hangs."""

    def call() -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - a thread's edge, and nobody is left to raise it to
            _log.warning("%s", described(error))

    thread = threading.Thread(target=call, name="stepguard-last-lines", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        call()  # Some versions of Python start no threads while the process exits.
    else:
        thread.join(secs)


@functools.cache
def _watch_exit(pid: int) -> None:
    """Stop the runs that are still open when the process exits, once per process."""
    atexit.register(_end_open_runs, pid)


def _end_open_runs(pid: int) -> None:
    # A forked child inherits this handler, but not the threads of its parent.
    if os.getpid() != pid:
        return
    deadline = time.monotonic() + _EXIT_SECS
    for run, end in list(_open_runs.items()):
        end(run, deadline)
