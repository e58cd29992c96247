"""Warns of loaders with persistent workers that the program uses itself, such as one for an evaluation.

A loader draws the seed of its workers from the random stream of the process when it starts them. Workers that persist
are started once in a process, so a restart draws that seed at another place, and all later random numbers of the
training are others. Inside ``sess.evaluating()`` the draw does not count.

PyTorch has no hook for this. So the method that makes a loader's iterator is replaced by one that looks at it first.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from stepguard.steps.feeds import is_function
from stepguard.steps.session import Session
from stepguard.torch.data.inside import Inside
from stepguard.words import logger

_log = logger(__name__)

_TORCHDATA = "torchdata.stateful_dataloader"
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
# How many epochs of loaders of the training are just being begun.
_beginning = 0


def watch_persistent_loaders(session: Session) -> None:
    """Warn, while ``session`` trains, of persistent workers that are started outside of ``evaluating()``."""
    _sessions.add(session)
    kinds = [DataLoader, getattr(sys.modules.get(_TORCHDATA), "StatefulDataLoader", None)]
    for kind in kinds:
        if kind is not None and not hasattr(kind._get_iterator, "stepguard"):
            kind._get_iterator = _looking(kind._get_iterator)


@contextmanager
def beginning() -> Iterator[None]:
    """A block that begins an epoch of a loader of the training."""
    global _beginning  # noqa: PLW0603 - one for the process, as the replaced method is
    _beginning += 1
    try:
        yield
    finally:
        _beginning -= 1


def _looking(get_iterator: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(get_iterator)
    def look(loader: Any) -> Any:
        if not _beginning and loader.num_workers and loader.persistent_workers:
            _look(loader)
        return get_iterator(loader)

    look.stepguard = True  # type: ignore[attr-defined]
    return look


def _look(loader: Any) -> None:
    for session in list(_sessions):
        if session.is_open and session.boundary.steps and not session.is_evaluating and not _trains(session, loader):
            _sessions.discard(session)
            _log.warning(
                "a DataLoader with persistent workers was started outside of the training, at step %d. It draws a "
                "random seed now and not at its later uses, so a run that is restarted draws at another place, and is "
                "not the same run from there on: put the evaluation into `with sess.evaluating():`",
                session.global_step,
            )


def _trains(session: Session, loader: Any) -> bool:
    """Whether ``loader`` is inside of a loader that ``steps`` was given; a function may have any inside."""
    return any(is_function(one) or loader in Inside(one).loaders for one in session.process_state.loaders)
