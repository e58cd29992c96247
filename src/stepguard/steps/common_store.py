"""What the processes of one training have in common: a store of keys and values that one of them, or a service, holds.

PyTorch has one (TCPStore), and so has JAX (its coordination service). What a framework's engine gives is an object that
satisfies :class:`CommonStore`.
"""

from __future__ import annotations

from typing import Protocol


class CommonStore(Protocol):
    """Keys and values that every process sees. Any thread.

    Every method raises ConnectionError when the store is not there any more: it ends with the process that holds it.
    """

    def set(self, key: str, value: bytes) -> None:
        """Put ``value`` in the place of what ``key`` has held."""

    def get(self, key: str) -> bytes:
        """The value of ``key``, which is there."""

    def check(self, key: str) -> bool:
        """Whether ``key`` is there."""

    def delete(self, key: str) -> None:
        """Take ``key`` away; one that is not there is no error."""

    def wait(self, keys: list[str], timeout_secs: float) -> bool:
        """Wait until all ``keys`` are there; ``False`` when some are not after ``timeout_secs``."""

    def below(self, name: str) -> CommonStore:
        """The part of this store whose keys begin with ``name``, for one who knows nothing of the rest."""
