"""The states in which a program can leave its run when its process ends; each engine's programs call :func:`end`."""

from __future__ import annotations

import atexit
import builtins
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

STATUS = {
    "never stopped": 0,
    "never stopped, without services": 0,
    "never closed": 0,
    "held by the interpreter itself": 0,
    "closed by an exit handler": 0,
    "a thread still trains": 0,
    "an error": 1,
    "an error in the block": 1,
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
    if state.endswith("block") or state == "a block that was never left":
        _in_a_block(state, managed, step, before_end)
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
    elif state == "a thread still trains":
        _start(lambda: _train_on(session, step)).join(0.05)
    elif state == "an error":
        raise ZeroDivisionError("this is the end")
    elif state == "sys.exit in a thread":
        _start(sys.exit).join()


_kept: list[Any] = []


def _in_a_block(
    state: str,
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
        _start(sys.exit).join()


def _train_on(session: Any, step: Callable[[Any], object]) -> None:
    # Quietly: what the end of the process does to it is not what is looked at.
    threading.excepthook = lambda _: None
    while True:
        step(session)


def _start(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread
