"""The processes of ``torch.distributed``: how many there are, and the store that they have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from stepguard.steps.common_store import StoreLostError

# The longest that fits the milliseconds of a poll: a wait that runs into its limit is reported on stderr, by C++.
_NO_LIMIT = timedelta(days=20)

_supervisors = 0


def world() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shared_store() -> TorchStore:
    """A part of the processes' common store that belongs to one Supervisor.

    Every process has to build its Supervisors in the same order, as it has to do with everything distributed.
    """
    global _supervisors  # noqa: PLW0603 - a number for each supervisor of the process
    _supervisors += 1
    # torchrun keeps its store when it starts the processes again, with all that the earlier ones have said in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # A client of our own: a wait on the one that the process group uses would hold that up. There is no public way to
    # the store that fits every init_method; to open another one would take an address, and a collective operation.
    store = dist.distributed_c10d._get_default_store().clone()
    return TorchStore(store).below(f"stepguard/{attempt}/{_supervisors}")


class TorchStore:
    """A store of ``torch.distributed`` as a :class:`stepguard.steps.common_store.CommonStore`.

    A client of such a store does one thing at a time: who waits has one of its own, which is used again afterwards.
    """

    def __init__(self, store: Any, idle: list[Any] | None = None, prefix: str = "") -> None:
        self._store = store
        self._idle: list[Any] = [] if idle is None else idle
        self._prefix = prefix

    def set(self, key: str, value: bytes) -> None:
        """Put ``value`` in the place of what ``key`` has held."""
        with _lost():
            self._store.set(self._prefix + key, value)

    def claim(self, key: str, value: bytes) -> bytes:
        """Put ``value`` there if ``key`` holds nothing; what it holds now."""
        with _lost():
            return bytes(self._store.compare_set(self._prefix + key, "", value))

    def get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of ``keys``, all of which are there."""
        with _lost():
            return [bytes(one) for one in self._store.multi_get([self._prefix + key for key in keys])]

    def check(self, key: str) -> bool:
        """Whether ``key`` is there."""
        with _lost():
            return bool(self._store.check([self._prefix + key]))

    def delete(self, key: str) -> None:
        """Take ``key`` away; one that is not there is no error."""
        with _lost():
            self._store.delete_key(self._prefix + key)

    def wait(self, keys: Sequence[str]) -> None:
        """Wait, on the side of the store, until all ``keys`` are there."""
        with _lost():
            client = self._idle.pop() if self._idle else self._store.clone()
            client.wait([self._prefix + key for key in keys], _NO_LIMIT)
            self._idle.append(client)

    def below(self, name: str) -> TorchStore:
        """The part of this store whose keys begin with ``name``."""
        return TorchStore(self._store, self._idle, f"{self._prefix}{name}/")


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # dist.DistError is one.
        raise StoreLostError(f"the store of the processes does not answer any more: {error}") from error
