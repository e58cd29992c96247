"""The logdir of a chief: its lock, which is kept when the logdir is cleared or removed under the run."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from stepguard.disk import files
from stepguard.errors import LogdirInUseError
from stepguard.store import lock
from stepguard.words import logger

_log = logger(__name__)


class HeldLogdir:
    """The logdir ``root`` of one store, which may hold the chief's lock there. Constructing it touches no disk.

    One thread at a time. Any thread may read :attr:`is_held`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        # The file system of the logdir, once `acquire` was called.
        self._device: int | None = None
        # A weak reference, so that a hold that nothing else refers to is given back.
        self._hold: Callable[[], lock.LogdirHold | None] = lambda: None

    @property
    def is_held(self) -> bool:
        """Whether this store holds the chief's lock."""
        return self._hold() is not None

    def acquire(self) -> lock.LogdirHold:
        """Take the chief's lock. See `CheckpointStore.acquire`."""
        files.make_dirs(self._root)
        hold = lock.acquire(self._root)
        self._device = self._root.stat().st_dev
        self._hold = weakref.ref(hold)
        return hold

    def make(self) -> None:
        """Create the logdir if it is missing, unless its file system has vanished since `acquire`.

        In that case a new directory would fill the disk below the mount point, unseen.
        """
        if self._device is None:
            files.make_dirs(self._root)
            return
        if self._root.is_dir():
            return
        try:
            is_filesystem_there = self._root.parent.stat().st_dev == self._device
        except FileNotFoundError:
            return
        if is_filesystem_there:
            files.make_dirs(self._root)
            _log.warning("%s: the logdir was removed while a run trains here; it is made again, empty", self._root)

    def renew(self) -> bool:
        """Renew the lock if the logdir was cleared or made again; return whether it was.

        Raises LogdirInUseError if another process is its chief now.
        """
        hold = self._hold()
        if hold is None or not hold.renew():
            return False
        _log.warning(
            "%s: the lock of this run was removed, as when it is cleared; it is locked again, and saved to", self._root
        )
        return True

    @contextlib.contextmanager
    def holding(self) -> Iterator[bool]:
        """A block that gets whether this process is the only possible chief of the logdir while the block lasts."""
        if self.is_held:
            yield True
            return
        try:
            hold = lock.acquire(self._root)
        except (LogdirInUseError, OSError) as error:
            _log.debug("not the chief of this logdir: %s", error)
            yield False
            return
        with hold:
            yield True
