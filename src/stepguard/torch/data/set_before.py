"""What the program itself sets in the data before an epoch: a seed, weights, a level of difficulty.

A checkpoint of an epoch's end has the data as that epoch has left it. A restarted program sets up the next epoch before
it gives the loader to `steps`, and what it sets there in each epoch must not be replaced by what the checkpoint has.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from stepguard.torch.data import generators
from stepguard.torch.data.contents import Contents
from stepguard.torch.data.counts import Counts


class SetBefore:
    """Looks at ``held``, what a feed keeps of its loader, when the body of an epoch begins and when the loader does."""

    def __init__(self, held: Sequence[Any]) -> None:
        self._held = held
        self._number = {id(one): number for number, one in enumerate(held)}
        self._names: set[str] = set()
        self._at_body: dict[str, Any] | None = None

    def begin_body(self) -> None:
        """Look at the data before the program sets up an epoch."""
        self._at_body = self._look()

    def begin_epoch(self) -> None:
        """Look again, now that the loader begins."""
        before, self._at_body = self._at_body, None
        if before is not None:
            self._names.update(name for name, one in self._look().items() if before.get(name) != one)

    def saved(self) -> list[str]:
        """The names of what the program has set."""
        return sorted(self._names)

    def restore(self, names: Iterable[str]) -> None:
        """Go on from what :meth:`saved` has returned in an earlier process."""
        self._names.update(names)

    def without(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """The objects with their states in a checkpoint, without what the program sets itself."""
        for one, state in pairs:
            number = self._number[id(one)]
            if isinstance(one, (Counts, Contents)) and isinstance(state, Mapping):
                yield one, {key: part for key, part in state.items() if f"{number}/{key}" not in self._names}
            elif str(number) not in self._names:
                yield one, state

    def _look(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, one in enumerate(self._held):
            if isinstance(one, Counts):
                found.update({f"{number}/{key}": value for key, value in one.values().items()})
            elif isinstance(one, Contents):
                found.update({f"{number}/{key}": value for key, value in one.digests().items()})
            else:
                (state,) = generators.states([one])
                plain = state.numpy().tobytes() if isinstance(state, torch.Tensor) else repr(state).encode()
                found[str(number)] = zlib.crc32(plain)
        return found
