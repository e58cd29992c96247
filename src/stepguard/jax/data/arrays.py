"""Shuffled batches of arrays that lie in memory, or are mapped into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from stepguard.steps.feeds import Feed


def batches(
    arrays: Any,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    sharding: Any = None,
) -> Batches:
    """A loader over arrays whose first dimensions are equal; a batch has the same form as ``arrays``.

    The order of an epoch depends on the seed and the number of the epoch only, so a resumed run continues with the next
    batch at once, with any number of processes.

    Args:
        arrays: a pytree of NumPy arrays, or of what is indexed like them, such as ``numpy.memmap``.
        batch_size: the number of examples in a batch, of all processes together.
        seed: another seed gives another order.
        shuffle: whether each epoch has an order of its own.
        drop_last: whether the last batch of an epoch is left out if it is smaller.
        sharding: gives each batch as JAX arrays with this sharding; each process reads only what its devices need.

    Raises:
        ValueError: the arrays differ in their first dimension, or have fewer examples than one batch.
    """
    return Batches(arrays, batch_size, seed, shuffle, drop_last, sharding)


class Batches:
    """What :func:`batches` returns. Each iteration is the next epoch."""

    def __init__(self, arrays: Any, batch_size: int, seed: int, shuffle: bool, drop_last: bool, sharding: Any) -> None:
        self.arrays = arrays
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.sharding = sharding
        self._epoch = 0
        sizes = sorted({len(array) for array in jax.tree.leaves(arrays)})
        if len(sizes) != 1:
            raise ValueError(f"batches: expected arrays of one length, found {sizes or 'no array'}")
        self.examples = sizes[0]
        if batch_size < 1 or not len(self):
            raise ValueError(f"batches: expected a batch_size of 1 to {self.examples}, found {batch_size}")

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        whole, rest = divmod(self.examples, self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch."""
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self.epoch(epoch)

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch without its first ``skip``."""
        order = np.arange(self.examples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, number]).permutation(self.examples)
        for index in range(skip, len(self)):
            rows = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield jax.tree.map(lambda array, rows=rows: self._batch(array, rows), self.arrays)

    def _batch(self, array: Any, rows: np.ndarray[Any, Any]) -> Any:
        if self.sharding is None:
            return array[rows]

        def own(index: tuple[slice, ...]) -> Any:
            columns = (slice(None), *index[1:])
            return array[rows[index[0]]][columns]

        return jax.make_array_from_callback((len(rows), *array.shape[1:]), self.sharding, own)


class ArraysFeed(Feed):
    """The position in :class:`Batches`: the number of the epoch and of the batch."""

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        return self.loader.epoch(self.epoch, skip)

    def description(self) -> dict[str, Any]:
        """What the order depends on."""
        loader = self.loader
        order = {"seed": loader.seed, "shuffle": loader.shuffle, "examples": loader.examples}
        return {**super().description(), **order}

    def _moved(self, position: dict[str, Any], before: int, processes: int) -> int:  # type: ignore[override]  # noqa: ARG002
        # A batch is that of all processes.
        return int(position["batches"])
