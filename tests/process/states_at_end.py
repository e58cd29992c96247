"""The states in which a program can leave its run when its process ends; each engine's programs call :func:`end`."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

STATUS = {
    "never stopped": 0,
    "never stopped, without services": 0,
    "never closed": 0,
    "held by the interpreter itself": 0,
    "closed by an exit handler": 0,
    "stopped by an exit handler": 0,
    "stopped and closed by a finalizer": 0,
    "closed and stopped by a finalizer": 0,
    "used by a finalizer": 0,
    "a generator in its block": 0,
    "a thread still trains": 0,
    "a thread that is no daemon trains to its end": 0,
    "a forked child ends": 0,
    "a forked child ends in the block": 0,
    "an error": 1,
    "an error in the block": 1,
    "an error in a service": 0,
    "an error in a service of the block": 1,
    "sys.exit in the block": 3,
    "sys.exit in a thread": 0,
    "sys.exit in a thread of a block": 0,
    "os._exit in the block": 7,
    "a block that was never left": 0,
}
"""Each state, and the exit status of a process that ends in it."""


def end(
    state: str,
    sv: Any,
    prepare: Callable[..., Any],
    managed: Callable[[], AbstractContextManager[Any]],
    step: Callable[[Any], object],
    before_end: Callable[[], object] = lambda: None,
) -> None:
    """Open a session of ``sv``, train, call ``before_end``, and leave the session in that state."""
    if state == "a generator in its block":
        _kept.append(_steps(managed, step, before_end))
        next(_kept[-1])
        return
    if state.endswith("block") or state == "a block that was never left":
        _in_a_block(state, sv, managed, step, before_end)
        return
    session = prepare() if state != "never stopped, without services" else prepare(start_standard_services=False)
    for _ in range(3):
        step(session)
    before_end()
    # A module's names are cleared while the interpreter goes; those of this one outlive the rest.
    _kept.append((sv, session))
    if state == "never closed":
        sv.stop()
    elif state == "held by the interpreter itself":
        builtins.kept = session  # type: ignore[attr-defined]
    elif state == "closed by an exit handler":
        atexit.register(session.close)
    elif state == "stopped by an exit handler":
        atexit.register(sv.stop)
    elif state == "stopped and closed by a finalizer":
        builtins.kept = Finalized(sv.stop, session.close)  # type: ignore[attr-defined]
    elif state == "closed and stopped by a finalizer":
        _kept.append(Finalized(session.close, sv.stop))
    elif state == "used by a finalizer":
        _kept.append(Finalized(lambda: step(session)))
    elif state == "a thread still trains":
        _start(lambda: _train_on(session, step)).join(0.05)
    elif state == "a thread that is no daemon trains to its end":
        threading.Thread(target=_train_to_the_end, args=(sv, session, step)).start()
    elif state == "a forked child ends":
        _fork()
    elif state == "an error in a service":
        sv.loop(None, _fail)
        sv.wait_for_stop()
    elif state == "an error":
        raise ZeroDivisionError("this is the end")
    elif state == "sys.exit in a thread":
        _start(sys.exit).join()


_kept: list[Any] = []


class Finalized:
    """Calls functions when it is freed, as objects of programs do that tidy up in ``__del__``."""

    def __init__(self, *calls: Callable[[], object]) -> None:
        self._calls = calls

    def __del__(self, _hide: Callable[..., Any] = contextlib.suppress) -> None:
        for call in self._calls:
            # A session that was closed at the exit of the process is an error to use.
            with _hide(RuntimeError):
                call()


def _steps(
    managed: Callable[[], AbstractContextManager[Any]], step: Callable[[Any], object], before_end: Callable[[], object]
) -> Iterator[None]:
    """The steps of a program that trains in a generator."""
    with managed() as session:
        step(session)
        before_end()
        yield
        raise AssertionError("nobody asks for a second one")


def _in_a_block(
    state: str,
    sv: Any,
    managed: Callable[[], AbstractContextManager[Any]],
    step: Callable[[Any], object],
    before_end: Callable[[], object],
) -> None:
    if state == "a block that was never left":
        block = managed()
        session = block.__enter__()
        step(session)
        before_end()
        _kept.append((block, session))
        return
    with managed() as session:
        step(session)
        before_end()
        if state == "an error in the block":
            raise ZeroDivisionError("this is the end")
        if state == "sys.exit in the block":
            sys.exit(3)
        if state == "os._exit in the block":
            os._exit(7)
        if state == "a forked child ends in the block":
            _fork()
        elif state == "an error in a service of the block":
            sv.loop(None, _fail)
            sv.wait_for_stop()
        else:
            _start(sys.exit).join()


def _fork() -> None:
    """Fork a child that ends as any process does, and wait for it. The child does not return from here."""
    pid = os.fork()
    if pid == 0:
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child has ended with {status}"


def _fail() -> None:
    raise ZeroDivisionError("this is the end")


def _train_to_the_end(sv: Any, session: Any, step: Callable[[Any], object]) -> None:
    # The main thread ends meanwhile, and the interpreter waits for this one.
    threading.main_thread().join()
    for _ in range(3):
        step(session)
    sv.stop()
    session.close()


def _train_on(session: Any, step: Callable[[Any], object]) -> None:
    # Quietly: what the end of the process does to it is not what is looked at.
    threading.excepthook = lambda _: None
    while True:
        step(session)


def _start(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread
