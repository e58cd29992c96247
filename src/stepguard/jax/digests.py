"""What the trace of a JAX program digests: the state by its first names, and the bytes of arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from stepguard.jax.checkpoint.tree import flatten
from stepguard.steps.digests import SAMPLED, array_bytes


def parts_of(state: Any) -> dict[str, Any]:
    """The leaves of ``state``, in groups by the first part of their names."""
    parts: dict[str, Any] = {}
    for leaf in flatten(state).leaves:
        first = str(leaf.keys[0]) if leaf.keys else leaf.name
        parts.setdefault(first, {})[leaf.name] = leaf.value
    return parts


def bytes_of(leaf: Any) -> Any:
    """The bytes of an array, or of the shards of it that this process has; of a device, those of some values."""
    if not isinstance(leaf, jax.Array):
        return array_bytes(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    shards = [np.asarray(_sampled(shard.data)) for shard in leaf.addressable_shards if shard.replica_id == 0]
    return b"".join(np.ascontiguousarray(one).tobytes() for one in shards)


def _sampled(array: jax.Array) -> jax.Array:
    if next(iter(array.devices())).platform == "cpu":
        return array
    flat = array.reshape(-1)
    return flat[:: max(1, flat.size // SAMPLED)]
