"""Iterators over DataLoaders from which the program itself takes batches, and not by ``steps``.

Nobody can put such an iterator back to its position, and after a restart it begins anew. A checkpoint notes those that
the steps have advanced, and a start that does not find them there says so. One that comes to its end in one step, as in
an evaluation, is none.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.data.dataloader import _BaseDataLoaderIter

from stepguard.steps.feeds import is_function
from stepguard.torch.data.inside import Inside
from stepguard.words import listed, logger

_log = logger(__name__)

# Those that were begun in this process, but for those of feeds, with the loaders and the kinds of their data.
_begun: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], str]] = weakref.WeakKeyDictionary()
# A step gets its batch by calls of these.
_FEEDS = ("stepguard.steps.feeds", "stepguard.steps.apart", "stepguard.steps.group_feed", "stepguard.torch.data")


def note(iterator: Any, loader: Any) -> None:
    """Note that the program has begun to iterate over ``loader`` itself."""
    if isinstance(iterator, _BaseDataLoaderIter):
        _begun[iterator] = weakref.ref(loader), type(loader.dataset).__name__


def is_for_a_step() -> bool:
    """Whether the method that calls this was called to get the batch of a step, at whatever depth."""
    # Not the frames of this call, which are in a module with the data.
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(_FEEDS):
            return True
        frame = frame.f_back
    return False


class _Place(NamedTuple):
    """How far an iterator is: what it iterates over, what kind of data that is, and how many batches it has given."""

    iterator: weakref.ref[Any]
    loader: Any
    data: str
    batches: int


class OwnIterators:
    """The iterators of the program, beside one session. For the training thread, or one that holds the boundary.

    ``of_steps`` are the loaders that ``steps`` was given.
    """

    def __init__(self, of_steps: Callable[[], list[Any]]) -> None:
        self._of_steps = of_steps
        self._before: Sequence[Mapping[str, Any]] = ()
        # How many batches each had given when the session began, and before the first step.
        self._at_session = _given()
        self._at_start: weakref.WeakKeyDictionary[Any, int] | None = None
        self._is_in_first = False
        # How far they were when the last step began: one that is gone has ended with the program's loop.
        self._last: list[_Place] = []
        # What there is to look at: the dictionary inside of the weak one, since every step asks.
        self._alive: Mapping[Any, Any] = vars(_begun)["data"]

    @property
    def is_needed(self) -> bool:
        """Whether a step must be told of by :meth:`begin_step`."""
        return self._at_start is None or bool(self._alive or self._last)

    def restore(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Go on after what :meth:`advanced` has returned in an earlier process."""
        self._before = saved

    def begin_step(self) -> None:
        """Note how far they are; before the first step, warn if those of the run before are not as far."""
        self._is_in_first = self._at_start is None
        if self._at_start is None:
            self._at_start = _given()
            before, self._before = self._before, ()
            _warn([one for one in before if not any(_is_as_far(here, one) for here in _places())])
        self._last = self._moved()

    def advanced(self) -> list[dict[str, Any]]:
        """The places of those that steps have advanced."""
        if self._at_start is None:
            return [dict(one) for one in self._before]
        places = [*self._moved(), *(one for one in self._last if one.iterator() is None)]
        of_steps = self._of_steps() if places else []
        if any(map(is_function, of_steps)):
            return []  # It may have any loader inside.
        inside = [held for one in of_steps for held in Inside(one).loaders]
        return [
            # The step either began with its batch, as in a loop over the loader, or it has fetched it.
            {"data": one.data, "batches": one.batches, "is_ahead": one in self._last}
            for one in places
            if not any(held is one.loader() for held in inside)
        ]

    def _moved(self) -> list[_Place]:
        """The places of those that have moved since the start."""
        # In the first step nobody knows which of those that moved before it go on to move.
        since = self._at_session if self._is_in_first or self._at_start is None else self._at_start
        moved = [one for one in _places() if one.batches not in (0, since.get(one.iterator(), 0))]
        known = {one.iterator for one in self._last}
        return [one for one in moved if one.iterator in known or not _is_at_end(one.iterator())]


def _given() -> weakref.WeakKeyDictionary[Any, int]:
    return weakref.WeakKeyDictionary({one: one._num_yielded for one in list(_begun)})


def _is_as_far(here: _Place, saved: Mapping[str, Any]) -> bool:
    """Whether an iterator is where one of the run before was, when a step begins."""
    if here.data != saved["data"]:
        return False
    return here.batches > saved["batches"] if saved["is_ahead"] else here.batches == saved["batches"]


def _places() -> list[_Place]:
    return [_Place(weakref.ref(one), loader, data, one._num_yielded) for one, (loader, data) in list(_begun.items())]


def _warn(gone: list[Mapping[str, Any]]) -> None:
    if gone:
        _log.warning(
            "the steps of the run took batches from DataLoaders by iterators of the program, and these begin anew, so "
            "that the batches are not those of the interrupted run: %s. Give the DataLoader to sess.steps(), which "
            'goes on with the next batch; several of them as sess.steps({"a": a, "b": b})',
            listed([f"{one['data']} (after {one['batches']:,} batches)" for one in gone]),
        )


def _is_at_end(iterator: Any) -> bool:
    try:
        return bool(iterator._num_yielded >= len(iterator._index_sampler))
    except (TypeError, NotImplementedError):
        return False
