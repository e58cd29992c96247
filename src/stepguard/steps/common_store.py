"""The key-value store that the processes of one training share; one of them, or a service, holds it.

PyTorch has such a store (TCPStore), and JAX has one (its coordination service). A framework's engine provides an object
that satisfies :class:`CommonStore`.

A wait is one request, which costs nothing until the store answers it. It blocks in native code, where neither Ctrl-C
nor an event of this process can end it. Therefore :func:`awaited` waits on a thread of its own, while its caller polls,
in its own process only, whether to go on waiting. If not, the caller writes the missing keys itself. So the waiting
thread always returns, even if the process that should have written the keys is dead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from stepguard.errors import NoBoundaryError

# How often the caller polls whether to go on waiting. This asks only its own process.
_LOOK_SECS = 0.02
# Not empty, because a claim cannot tell an empty value from a key that is not set.
_VOID = b"-"


class StoreLostError(NoBoundaryError):
    """The store no longer exists, so the processes cannot agree on a step."""


class CommonStore(Protocol):
    """Keys and values that every process sees. Any thread.

    Every method raises StoreLostError if the store no longer exists; it ends with the process that holds it.
    """

    def set(self, key: str, value: bytes) -> None:
        """Set ``key`` to ``value``."""

    def claim(self, key: str, value: bytes) -> bytes:
        """Set ``key`` to ``value`` unless it is set, in one atomic request; return its value now."""

    def get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of ``keys``, all of which must be set."""

    def check(self, key: str) -> bool:
        """Whether ``key`` is set."""

    def delete(self, key: str) -> None:
        """Delete ``key``. A key that is not set is no error."""

    def wait(self, keys: Sequence[str]) -> None:
        """Wait until all ``keys`` are set: without a limit, and by one request, not by polling.

        Calls of other threads go on meanwhile.
        """

    def below(self, name: str) -> CommonStore:
        """The part of this store whose keys begin with ``name``, as a store of its own."""


def awaited(store: CommonStore, keys: Sequence[str], check: Callable[[], None]) -> list[bytes]:
    """Wait until all ``keys`` are set, and return their values. ``check`` is polled meanwhile, and raises to give up.

    If the wait is given up, keys that nobody has set are set to a void value; callers must not use them again.
    """
    if not keys:
        return []
    is_over = threading.Event()
    failures: list[StoreLostError] = []

    def wait() -> None:
        try:
            store.wait(keys)
        except StoreLostError as error:
            failures.append(error)
        finally:
            is_over.set()

    waiting = threading.Thread(target=wait, name="stepguard-wait", daemon=True)
    waiting.start()
    try:
        while not is_over.wait(_LOOK_SECS):
            check()
    except BaseException:
        for key in keys:
            store.claim(key, _VOID)
        waiting.join()
        raise
    waiting.join()
    if failures:
        raise failures[0]
    return store.get(keys)
