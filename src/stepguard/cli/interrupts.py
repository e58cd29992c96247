"""What Ctrl-C does to a command.

Until the command begins, and once it has ended, SIGINT has its default action: it ends the process without a word. The
command itself gets a KeyboardInterrupt, which removes what the command leaves behind, and ends in one line. While the
command imports a framework, Ctrl-C waits: extension modules swallow the exception, or take it for another error.

`stepguard.__main__` sets the default action. A program that calls the commands otherwise keeps its own handler.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


def raise_them() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, if it would end the process so far."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """What `raise_them` changes in the block ends with it."""
    ends = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block, instead of in its middle; a second Ctrl-C ends the process.

    For imports. It does nothing where Ctrl-C does not raise. Main thread only.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt
