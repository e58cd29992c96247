"""Loaders that the program uses itself; with persistent workers, such as one for an evaluation, without any effect.

A loader draws the seed of its workers from the random stream of the process when it starts them. Workers that persist
are started once in a process, so a restarted run draws that seed at another place than the run before, and all later
random numbers of the training would be others. Therefore nothing that such a loader draws when it is iterated over
counts, while a session is open: the streams go on as they were. A thread beside the training is let alone: what both
draw meanwhile cannot be told apart, with and without a session.

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
from torch.utils.data import DataLoader

from stepguard.steps.feeds import is_function
from stepguard.steps.session import Session
from stepguard.torch.data import own_iterators
from stepguard.torch.data.inside import Inside
from stepguard.torch.random_states import STREAMS

_TORCHDATA = "torchdata.stateful_dataloader"
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class _Beginning(threading.local):
    """How many epochs of loaders of the training this thread is just beginning."""

    count = 0


_beginning = _Beginning()


def keep_from_persistent_loaders(session: Session) -> None:
    """Keep the random streams from persistent workers that the program starts itself, while ``session`` is open."""
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
        if _beginning.count:
            return iterate(loader)
        iterator = _begun_by_the_program(loader)
        own_iterators.note(iterator, loader)
        return iterator

    def _begun_by_the_program(loader: Any) -> Any:
        if not loader.num_workers or not loader.persistent_workers or not _is_of_the_program(loader):
            return iterate(loader)
        with STREAMS.preserved():
            if loader._iterator is not None and loader.generator is None:
                # New workers draw their seed first, so that the order of an epoch is the same with and without them.
                torch.empty((), dtype=torch.int64).random_()
            return iterate(loader)

    begin.stepguard = True  # type: ignore[attr-defined]
    return begin


def _is_of_the_program(loader: Any) -> bool:
    """Whether a session is open on this thread, and ``loader`` is not inside of a loader that ``steps`` was given."""
    here = (None, threading.get_ident())
    sessions = [session for session in list(_sessions) if session.is_open and session.boundary.thread in here]
    trained_with = [one for session in sessions for one in session.process_state.loaders]
    # A function may have any loader inside.
    return bool(sessions) and not any(is_function(one) or loader in Inside(one).loaders for one in trained_with)


# Programs make iterators before their sessions.
watch_loaders()
