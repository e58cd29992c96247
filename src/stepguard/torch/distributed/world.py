"""The processes of ``torch.distributed``: their number, and their common store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from stepguard.steps.common_store import StoreLostError

# The longest time that fits into the milliseconds of a poll. A wait that reaches its limit makes C++ print to stderr.
_NO_LIMIT = timedelta(days=20)

_supervisors = 0


def world() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shared_store() -> TorchStore:
    """The part of the processes' common store that belongs to one Supervisor.

    All processes must build their Supervisors in the same order, as they must do for everything distributed.
    """
    global _supervisors  # noqa: PLW0603 - a number for each supervisor of the process
    _supervisors += 1
    # torchrun keeps its store when it restarts the processes, with all keys that the earlier processes have set.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # A client of our own, because a wait on the process group's client would block that group. No public function
    # returns the store for every init_method; another store would need an address and a collective operation.
    store = dist.distributed_c10d._get_default_store().clone()
    return TorchStore(store).below(f"stepguard/{attempt}/{_supervisors}")


class TorchStore:
    """A store of ``torch.distributed`` as a :class:`stepguard.steps.common_store.CommonStore`.

    A client of such a store does one thing at a time. So each wait takes a client of its own, and later waits reuse it.
    """

    def __init__(self, store: Any, idle: list[Any] | None = None, prefix: str = "") -> None:
        self._store = store
        self._idle: list[Any] = [] if idle is None else idle
        self._prefix = prefix

    def set(self, key: str, value: bytes) -> None:
        """Set ``key`` to ``value``."""
        with _lost():
            self._store.set(self._prefix + key, value)

    def claim(self, key: str, value: bytes) -> bytes:
        """Set ``key`` to ``value`` unless it is set; return its value now."""
        with _lost():
            return bytes(self._store.compare_set(self._prefix + key, "", value))

    def get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of ``keys``, all of which must be set."""
        with _lost():
            return [bytes(one) for one in self._store.multi_get([self._prefix + key for key in keys])]

    def check(self, key: str) -> bool:
        """Whether ``key`` is set."""
        with _lost():
            return bool(self._store.check([self._prefix + key]))

    def delete(self, key: str) -> None:
        """Delete ``key``. A key that is not set is no error."""
        with _lost():
            self._store.delete_key(self._prefix + key)

    def wait(self, keys: Sequence[str]) -> None:
        """Wait, without polling, until all ``keys`` are set."""
        with _lost():
            client = self._idle.pop() if self._idle else self._store.clone()
            client.wait([self._prefix + key for key in keys], _NO_LIMIT)
            self._idle.append(client)

    def below(self, name: str) -> TorchStore:
        """The part of this store whose keys begin with ``name/``."""
        return TorchStore(self._store, self._idle, f"{self._prefix}{name}/")


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # dist.DistError is a RuntimeError.
        raise StoreLostError(f"the store of the processes does not answer any more: {error}") from error
