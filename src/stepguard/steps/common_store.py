"""What the processes of one training have in common: a store of keys and values that one of them, or a service, holds.

PyTorch has one (TCPStore), and so has JAX (its coordination service). What a framework's engine gives is an object that
satisfies :class:`CommonStore`.

A wait is one request, and costs nothing until the store answers it. It ends in native code, where neither Ctrl-C nor an
event of this process reaches it; therefore :func:`awaited` waits in a thread of its own, while its caller looks here,
in its own process, whether waiting still makes sense. When it does not, the caller writes the missing keys itself: so
the thread always returns, also where the process that was to write them is dead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from stepguard.errors import NoBoundaryError

# How often the caller looks whether waiting still makes sense. It asks nobody but its own process.
_LOOK_SECS = 0.02
# Not empty: nothing and an empty value are the same to a claim.
_VOID = b"-"


class StoreLostError(NoBoundaryError):
    """The store is not there any more, so the processes cannot agree on a step."""


class CommonStore(Protocol):
    """Keys and values that every process sees. Any thread.

    Every method raises StoreLostError when the store is not there any more: it ends with the process that holds it.
    """

    def set(self, key: str, value: bytes) -> None:
        """Put ``value`` in the place of what ``key`` has held."""

    def claim(self, key: str, value: bytes) -> bytes:
        """Put ``value`` there if ``key`` holds nothing; what it holds now."""

    def get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of ``keys``, all of which are there."""

    def check(self, key: str) -> bool:
        """Whether ``key`` is there."""

    def delete(self, key: str) -> None:
        """Take ``key`` away; one that is not there is no error."""

    def wait(self, keys: Sequence[str]) -> None:
        """Wait, without a limit and on the side of the store, until all ``keys`` are there.

        Other calls, of other threads, go on meanwhile.
        """

    def below(self, name: str) -> CommonStore:
        """The part of this store whose keys begin with ``name``, for one who knows nothing of the rest."""


def awaited(store: CommonStore, keys: Sequence[str], check: Callable[[], None]) -> list[bytes]:
    """The values of ``keys``, once all are there; ``check`` is called meanwhile, and raises to give up.

    No key is used again afterwards: one that nobody had written when this gave up is void.
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
