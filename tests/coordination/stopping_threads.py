"""Errors and threads that the tests of the coordinator share."""

from __future__ import annotations

import threading
from collections.abc import Callable

# More than anything here takes, and less than anyone would wait.
SOON_SECS = 60.0


class BoomError(Exception):
    """What goes wrong in these tests."""


class InputEndedError(Exception):
    """A clean stop."""


class CutShortError(Exception):
    """What a stop makes other threads say."""


def boom(text: str = "boom") -> None:
    raise BoomError(text)


def raised(text: str = "boom") -> BoomError:
    try:
        boom(text)
    except BoomError as error:
        return error
    raise AssertionError


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


class Threads:
    """Starts threads, and ends at the latest with the test."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.started: list[threading.Thread] = []

    def start(self, work: Callable[..., object], *args: object, name: str | None = None) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, name=name, daemon=True)
        self.started.append(thread)
        thread.start()
        return thread

    def stubborn(self, name: str = "stubborn") -> threading.Thread:
        """A thread that does not listen to any coordinator."""
        return self.start(self.release.wait, name=name)
