"""The position in a ``tf.data.Dataset``, which keeps none of its own that a small file could hold."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from stepguard.steps.feeds import FunctionFeed, length
from stepguard.steps.random_streams import RandomStreams


class TfDataFeed(FunctionFeed):
    """A data set, or its method ``as_numpy_iterator``. A resumed run reads the seen batches of the epoch again.

    A shuffle gives each iterator an order of its own, which depends on its seed and on the number of iterators that
    were made before. So one iterator is made, and not read, for each epoch that an earlier process has seen.
    """

    def __init__(self, loader: Any, streams: RandomStreams) -> None:
        super().__init__(loader, streams)
        self._made = 0

    @property
    def length(self) -> int | None:
        """The number of batches in an epoch; ``None`` if unknown."""
        return length(_dataset(self.loader))

    def _open(self) -> Iterator[Any]:
        is_method = isinstance(self.loader, types.MethodType)
        make = self.loader if is_method else self.loader.__iter__
        while self._made < self.epoch:
            make()
            self._made += 1
        self._made += 1
        return iter(make())


def is_tf_data(loader: Any) -> bool:
    """Whether ``loader`` is a data set of ``tf.data``, or a method of one."""
    kinds = type(_dataset(loader)).__mro__
    is_tensorflows = any(kind.__module__.partition(".")[0] == "tensorflow" for kind in kinds)
    return is_tensorflows and any(kind.__name__ == "DatasetV2" for kind in kinds)


def _dataset(loader: Any) -> Any:
    return loader.__self__ if isinstance(loader, types.MethodType) else loader
