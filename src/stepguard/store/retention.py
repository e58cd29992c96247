"""The rules by which checkpoints are kept, which are those of ``tf.compat.v1.train.Saver``."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from stepguard.store.checkpoint import Checkpoint


class Retention:
    """The checkpoints that a run owns, and may remove: the last ``max_to_keep`` that it committed or adopted.

    0 or None keeps all. Of the older ones, one for each ``keep_every_n_hours`` stays for ever. The hours are counted
    from ``anchor`` (Unix time), which the store sets when it first needs it.

    Pinned checkpoints are set aside: they neither count nor are removed. One that is no longer pinned counts again, in
    its place by time.
    """

    def __init__(self, max_to_keep: int | None, keep_every_n_hours: float | None) -> None:
        if max_to_keep is not None and max_to_keep < 0:
            raise ValueError(f"max_to_keep must be >= 0, got {max_to_keep}")
        if keep_every_n_hours is not None and not keep_every_n_hours > 0:
            raise ValueError(f"keep_every_n_hours must be > 0, got {keep_every_n_hours}")
        self.max_to_keep = max_to_keep
        self.keep_every_n_hours = keep_every_n_hours
        self.anchor: float | None = None
        self._owned: list[Checkpoint] = []
        self._fallen_out: list[Checkpoint] = []
        self._aside: list[Checkpoint] = []

    @property
    def owned(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that are kept by their number, oldest first."""
        return tuple(self._owned)

    @property
    def aside(self) -> tuple[Checkpoint, ...]:
        """The pinned ones."""
        return tuple(self._aside)

    def adopt(self, checkpoints: Iterable[Checkpoint], pinned: Collection[str] = ()) -> None:
        """Own these checkpoints, oldest first, in place of those owned so far."""
        found = list(checkpoints)
        self._owned = [one for one in found if one.name not in pinned]
        adopted = {one.name for one in found}
        # A list of the framework's own may not have those that were pinned before.
        self._aside = [one for one in self._aside if one.name not in adopted]
        self._aside += [one for one in found if one.name in pinned]
        self._fallen_out = []

    def add(self, checkpoint: Checkpoint, pinned: Collection[str] = ()) -> None:
        """Own one more, the newest."""
        if not self.max_to_keep:
            return
        for owned in (self._owned, self._fallen_out, self._aside):
            owned[:] = [one for one in owned if one.name != checkpoint.name]
        self._owned.append(checkpoint)
        self.pin(pinned)

    def pin(self, pinned: Collection[str]) -> None:
        """Set aside the checkpoints of these names and no others, and make the surplus of the rest doomed."""
        released = [one for one in self._aside if one.name not in pinned]
        self._aside = [one for one in [*self._aside, *self._fallen_out, *self._owned] if one.name in pinned]
        self._fallen_out = [one for one in self._fallen_out if one.name not in pinned]
        self._owned = [one for one in self._owned if one.name not in pinned]
        for one in released:
            place = next((n for n, other in enumerate(self._owned) if other.time > one.time), len(self._owned))
            self._owned.insert(place, one)
        self.trim()

    @property
    def doomed(self) -> tuple[Checkpoint, ...]:
        """The surplus checkpoints. Whether each is removed or stays for ever is decided in :meth:`take_doomed`."""
        return tuple(self._fallen_out)

    def trim(self) -> None:
        """Make the surplus doomed now, as the next `add` would."""
        excess = max(0, len(self._owned) - (self.max_to_keep or len(self._owned)))
        self._fallen_out += self._owned[:excess]
        del self._owned[:excess]

    def take_doomed(self, protected: Collection[str | None]) -> list[Checkpoint]:
        """Return the checkpoints to remove now, and forget them. Protected ones wait for a later call."""
        waiting = [one for one in self._fallen_out if one.name in protected]
        doomed = [one for one in self._fallen_out if one.name not in protected and not self._stays_for_ever(one)]
        self._fallen_out = waiting
        return doomed

    def put_back(self, doomed: Iterable[Checkpoint]) -> None:
        """Make these doomed again for the next call, because they could not be removed."""
        self._fallen_out = [*doomed, *self._fallen_out]

    def _stays_for_ever(self, checkpoint: Checkpoint) -> bool:
        if self.keep_every_n_hours is None or self.anchor is None:
            return False
        interval = self.keep_every_n_hours * 3600
        if checkpoint.time <= self.anchor + interval:
            return False
        self.anchor += interval
        # The Saver uses such a grid too, but after a long pause it keeps every checkpoint until it has caught up,
        # although one for each interval was asked for.
        behind = checkpoint.time - self.anchor
        if behind > interval:
            self.anchor += interval * (math.ceil(behind / interval) - 1)
        return True
