"""Chooses how the position in a loader is kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from stepguard.errors import described
from stepguard.steps.feeds import Feed, is_function, shown
from stepguard.steps.group_feed import GroupFeed
from stepguard.torch.data.inside import Inside
from stepguard.torch.data.map_feed import MapFeed
from stepguard.torch.data.outliving import starting_workers
from stepguard.torch.data.persistent import beginning
from stepguard.torch.data.stateful_feed import NodesFeed, TorchStatefulFeed, WorkerStatefulFeed, is_of_nodes
from stepguard.torch.data.stream_feed import StreamFeed, TorchFunctionFeed, WorkerStreamFeed
from stepguard.torch.data.workers import has_state
from stepguard.words import logger

_log = logger(__name__)


def feed_of(loader: Any) -> Feed:
    """The feed for a loader of any kind.

    Raises:
        TypeError: ``loader`` cannot be iterated over, or has a state that cannot be saved.
    """
    with _starting(loader):  # torchdata's loader starts its workers when it is asked for its state.
        feed = _feed_of(loader)
    feed.starting = _starting
    return feed


@contextmanager
def _starting(loader: Any) -> Iterator[None]:
    with beginning(), starting_workers(loader):
        yield


def _feed_of(loader: Any) -> Feed:
    if _is_group(loader):
        return GroupFeed(loader, feed_of)
    if is_function(loader):
        return TorchFunctionFeed(loader)
    if _is_plain_loader(loader):
        return _feed_of_plain(loader)
    if _is_stateful(loader) and not Inside(loader).reads_by_index:
        return _stateful_or_not(loader)
    if not hasattr(loader, "__iter__") or isinstance(loader, type):
        raise TypeError(f"steps: expected a loader or None, found {type(loader).__name__}: {loader!r:.80}")
    return StreamFeed(loader)


def _feed_of_plain(loader: Any) -> Feed:
    """The feed of a DataLoader, or of torchdata's StatefulDataLoader, that iterates as its class does."""
    dataset = loader.dataset
    if not isinstance(dataset, IterableDataset):
        # Also torchdata's loader, whose own state keeps the order only of torchdata's own samplers.
        return MapFeed(loader)
    if _is_stateful(loader) and _keeps_position(dataset):
        return WorkerStatefulFeed(loader) if loader.num_workers else TorchStatefulFeed(loader)
    if loader.num_workers:
        return StreamFeed(loader) if _is_pipe(dataset) else WorkerStreamFeed(loader)
    return TorchStatefulFeed(loader, of_dataset=True) if _is_stateful(dataset) else StreamFeed(loader)


def _stateful_or_not(loader: Any) -> Feed:
    if is_of_nodes(loader):
        return NodesFeed(loader)
    try:
        return TorchStatefulFeed(loader)
    except TypeError:
        raise
    except Exception as error:  # noqa: BLE001 - any loader's own code
        _log.warning(
            "%s: its state_dict() fails, so a restart will read the seen batches again: %s",
            shown(loader),
            described(error),
        )
        return StreamFeed(loader)


def _is_group(loader: Any) -> bool:
    if isinstance(loader, Mapping):
        return True
    # A list of batches is the data itself.
    return type(loader) in (list, tuple) and bool(loader) and all(_is_loader(one) for one in loader)


def _is_loader(one: Any) -> bool:
    is_data = isinstance(one, (str, bytes, list, tuple, dict)) or hasattr(one, "__array__")
    return not is_data and (_is_stateful(one) or bool(Inside(one).loaders))


def _is_plain_loader(loader: Any) -> bool:
    kind = type(loader)
    if not issubclass(kind, DataLoader):
        return False
    if kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator:
        return True
    return kind.__module__.startswith("torchdata.") and kind.__name__ == "StatefulDataLoader"


def _is_stateful(holder: Any) -> bool:
    return not isinstance(holder, nn.Module) and has_state(holder)


def _keeps_position(dataset: Any) -> bool:
    """Whether a data set, or the iterators that it makes, may have a state that torchdata's loader saves."""
    return _is_stateful(dataset) or not inspect.isgeneratorfunction(type(dataset).__iter__)


def _is_pipe(dataset: Any) -> bool:
    # DataLoader treats data pipes, which are no ordinary data sets, in a way of its own.
    return hasattr(dataset, "__iter__") and type(dataset).__module__.startswith("torch.utils.data.datapipes")
