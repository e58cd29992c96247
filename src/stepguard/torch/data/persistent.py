"""Loaders with persistent workers that the program iterates over itself, such as one for an evaluation.

A loader draws the seed of its workers from a random stream when it starts them. Workers that persist are started once
in a process, so a restarted run draws that seed at another place than the run before, and all later random numbers of
the training would be others. Its workers would draw others too, since their streams go on from iteration to iteration.
Therefore, while a session is open, such a loader draws a seed whenever somebody begins to iterate over it, as one does
whose workers do not persist, and its workers begin anew with that seed. A thread beside the training is let alone: what
both draw meanwhile cannot be told apart, with and without a session.

PyTorch has no hook for this, so ``DataLoader.__iter__`` is replaced by a method that looks at the loader first.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterDataPipe, MapDataPipe
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from stepguard.steps.session import Session
from stepguard.torch.data import own_iterators
from stepguard.torch.data.outliving import prepares_workers

_TORCHDATA = "torchdata.stateful_dataloader"
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
# The iterators whose workers take a new seed for each iteration.
_seeded: weakref.WeakSet[Any] = weakref.WeakSet()


class _Beginning(threading.local):
    """How many epochs of loaders of the training this thread is just beginning."""

    count = 0


_beginning = _Beginning()


def keep_from_persistent_loaders(session: Session) -> None:
    """Have persistent workers that the program starts itself draw as new ones, while ``session`` is open."""
    _sessions.add(session)
    watch_loaders()


def watch_loaders() -> None:
    """Be told, from now on, when somebody begins to iterate over a loader."""
    for kind in (DataLoader, getattr(sys.modules.get(_TORCHDATA), "StatefulDataLoader", None)):
        if kind is not None and not hasattr(kind.__iter__, "stepguard"):
            kind.__iter__ = _kept_apart(kind.__iter__)


@contextmanager
def beginning() -> Iterator[None]:
    """A block that begins an epoch of a loader of the training."""
    _beginning.count += 1
    try:
        yield
    finally:
        _beginning.count -= 1


def _kept_apart(iterate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(iterate)
    def begin(loader: Any) -> Any:
        if _beginning.count or own_iterators.is_for_a_step():
            return iterate(loader)
        is_kept = loader.num_workers and loader.persistent_workers and _is_in_a_session()
        if is_kept and loader._iterator is not None:
            _begin_anew(loader)
        iterator = iterate(loader)
        if is_kept and type(iterator) is _MultiProcessingDataLoaderIter and prepares_workers():
            _seeded.add(iterator)
        own_iterators.note(iterator, loader)
        return iterator

    begin.stepguard = True  # type: ignore[attr-defined]
    return begin


def _begin_anew(loader: Any) -> None:
    """Have the workers of ``loader`` begin as new ones would, or start new ones where that cannot be."""
    if loader._iterator not in _seeded or isinstance(loader.dataset, (IterDataPipe, MapDataPipe)):
        loader._iterator = None
        return
    # New workers draw their seed first, so that the order of an epoch is the same with and without them.
    loader._iterator._shared_seed = torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item()


def _is_in_a_session() -> bool:
    """Whether a session is open on this thread."""
    here = (None, threading.get_ident())
    return any(session.is_open and session.boundary.thread in here for session in list(_sessions))


# Programs make iterators before their sessions.
watch_loaders()
