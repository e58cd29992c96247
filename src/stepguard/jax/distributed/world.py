"""The processes of ``jax.distributed``: their number, and their common store."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import distributed

from stepguard.steps.common_store import StoreLostError

# The longest wait for one key, in milliseconds.
_NO_LIMIT_MS = 20 * 24 * 3600 * 1000

_supervisors = itertools.count(1)


def world() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without ``jax.distributed``.

    Without it no backend is started, so that a program may still choose its platform.
    """
    if distributed.global_state.client is None:
        return 0, 1
    return jax.process_index(), jax.process_count()


def shared_store() -> JaxStore:
    """The part of the coordination service that belongs to one Supervisor.

    All processes must build their Supervisors in the same order, as they must do for everything distributed.
    """
    return JaxStore(distributed.global_state.client).below(f"stepguard/{next(_supervisors)}")


class JaxStore:
    """The key-value service of ``jax.distributed`` as a :class:`stepguard.steps.common_store.CommonStore`.

    Its client has no public name in JAX 0.10. It serves several threads at once.
    """

    def __init__(self, client: Any, prefix: str = "") -> None:
        self._client = client
        self._prefix = prefix

    def set(self, key: str, value: bytes) -> None:
        """Set ``key`` to ``value``."""
        with _lost():
            self._client.key_value_set_bytes(self._prefix + key, value, True)

    def claim(self, key: str, value: bytes) -> bytes:
        """Set ``key`` to ``value`` unless it is set; return its value now."""
        with _lost():
            try:
                self._client.key_value_set_bytes(self._prefix + key, value, False)
            except jax.errors.JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise
            return bytes(self._client.key_value_try_get_bytes(self._prefix + key))

    def get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of ``keys``, all of which must be set."""
        with _lost():
            return [bytes(self._client.key_value_try_get_bytes(self._prefix + key)) for key in keys]

    def check(self, key: str) -> bool:
        """Whether ``key`` is set."""
        with _lost():
            try:
                self._client.key_value_try_get_bytes(self._prefix + key)
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" not in str(error):
                    raise
                return False
            return True

    def delete(self, key: str) -> None:
        """Delete ``key``. A key that is not set is no error."""
        with _lost():
            self._client.key_value_delete(self._prefix + key)

    def wait(self, keys: Sequence[str]) -> None:
        """Wait, without polling, until all ``keys`` are set."""
        with _lost():
            for key in keys:
                self._client.blocking_key_value_get_bytes(self._prefix + key, _NO_LIMIT_MS)

    def below(self, name: str) -> JaxStore:
        """The part of this store whose keys begin with ``name/``."""
        return JaxStore(self._client, f"{self._prefix}{name}/")


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise StoreLostError(f"the store of the processes does not answer any more: {error}") from error
