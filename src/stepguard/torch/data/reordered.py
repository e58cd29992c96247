"""Lists and arrays of the program that it shuffles in place at the beginning of each epoch, for the order of its data.

The order of an epoch then depends on those of all epochs before, and a restarted program begins with the first one. A
checkpoint has a digest of each that was seen to be shuffled so, and a start that does not come to the same names it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from stepguard.steps.strangers import program_frames, variables
from stepguard.torch.data.contents import digest, is_content
from stepguard.words import listed, logger

_log = logger(__name__)

# Longer ones would take more than a moment of each epoch.
_MOST_VALUES = 2**17
_MOST_NUMBERS = 2**22
# In the first epochs of a process all are looked at, and then those alone that were shuffled.
_EPOCHS = 3


class Reordered:
    """The lists and arrays of one session. For the training thread, or a thread that holds the boundary."""

    def __init__(self) -> None:
        # At the beginning of a body: by the name, the identity, the digest, and one that no order changes.
        self._at_body: dict[str, tuple[int, Any, int]] = {}
        # Those that were shuffled, and their digests when the loop of the running epoch began.
        self._found: dict[str, Any] = {}
        self._at_loop: dict[str, Any] = {}
        self._before: Mapping[str, str] = {}
        self._epochs_left = _EPOCHS

    @property
    def has_found(self) -> bool:
        """Whether the program shuffles any in place."""
        return bool(self._found)

    def saved(self, is_begun: bool) -> dict[str, str]:
        """The digests with which the running epoch has begun, or with which the next one begins."""
        if self._before:
            return dict(self._before)
        at_loop = self._at_loop if is_begun else {name: digest(one) for name, one in self._found.items()}
        return {name: repr(one) for name, one in at_loop.items()}

    def restore(self, saved: Mapping[str, str]) -> None:
        """Compare with what :meth:`saved` has returned in an earlier process."""
        self._before = saved

    def begin_body(self, frame: Any, *, is_begun: bool) -> None:
        """Look at what ``frame`` and those around it have; ``is_begun`` if the epoch was begun before the restart."""
        self._epochs_left -= 1
        held = self._held(frame)
        self._at_body = {name: (id(one), digest(one), _unordered(one)) for name, one in held.items()}
        if self._before and not is_begun:
            self._compare(held)

    def begin_loop(self, frame: Any) -> None:
        """Look again, now that the program has set up the epoch."""
        before, self._at_body = self._at_body, {}
        if not before:
            return
        held = self._held(frame)
        for name, one in held.items():
            number, was, unordered = before.get(name, (0, None, 0))
            if number == id(one) and digest(one) != was and _unordered(one) == unordered:
                self._found[name] = one
        self._at_loop = {name: digest(one) for name, one in self._found.items()}
        self._compare(held)

    def _held(self, frame: Any) -> Mapping[str, Any]:
        return _held(frame) if self._epochs_left >= 0 or self._before else self._found

    def _compare(self, held: Mapping[str, Any]) -> None:
        before, self._before = self._before, {}
        others = [name for name, one in before.items() if name in held and repr(digest(held[name])) != one]
        if others:
            _log.warning(
                "the program shuffles %s in place at the beginning of each epoch, so that its order depends on all "
                "epochs before, and it does not have the order of the interrupted run: if the batches depend on it, "
                "they are others from here on. Draw each order anew, as by random.sample(items, len(items)), "
                "np.random.permutation(n) or torch.randperm(n)",
                listed(others),
            )


def _held(frame: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in program_frames(frame):
        for name, value in variables(one):
            if _is_order(value):
                found.setdefault(name, value)
    return found


def _is_order(value: Any) -> bool:
    if type(value) is list:
        return 1 < len(value) <= _MOST_VALUES and is_content(value)
    is_row = is_content(value) and len(getattr(value, "shape", ())) == 1 and 1 < len(value) <= _MOST_NUMBERS
    return is_row and not (isinstance(value, torch.Tensor) and value.device.type != "cpu")


def _unordered(value: Any) -> int:
    """A digest that is the same whatever the order of the values."""
    if type(value) is list:
        return sum(zlib.crc32(repr(one).encode()) for one in value)
    if isinstance(value, torch.Tensor):
        return zlib.crc32(value.sort().values.view(torch.uint8).numpy().tobytes())
    ordered = value.copy()
    ordered.sort()
    return zlib.crc32(ordered.tobytes())
