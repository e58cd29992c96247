"""Adoption: committing and counting the checkpoints that the framework itself writes into the directory of the run."""

from __future__ import annotations

import os
from typing import Any

from stepguard.engine import Engine, HearsOfCommits, KeepsCheckpoints
from stepguard.store import CheckpointStore
from stepguard.store.marks import Marks
from stepguard.words import logger

_log = logger(__name__)


class Adoption:
    """Keeps the store's list of checkpoints equal to the framework's own list. Writer thread."""

    def __init__(self, engine: Engine[Any], store: CheckpointStore) -> None:
        self._saver = engine if isinstance(engine, KeepsCheckpoints) else None
        self._hearer = engine if isinstance(engine, HearsOfCommits) else None
        self._store = store

    def adopt(self) -> None:
        """Add the checkpoints that the program has saved through its framework, and forget those it has removed."""
        kept = () if self._saver is None else self._saver.kept_checkpoints()
        if kept and set(kept) != {one.name for one in self._store.owned}:
            found = {one.name: one for one in self._store.candidates()}
            self._store.adopt([found[name] for name in kept if name in found])
            # A save of the program's own under another name has its saver remove the oldest of this one.
            self._store.forget_removed()

    def tell(self) -> None:
        """Tell the engine, after a commit of the store, which checkpoints are kept."""
        if self._hearer is not None:
            self._hearer.committed([(str(one.path), one.time) for one in self._store.owned])

    def commit(self, written: str, marks: Marks) -> None:
        """Commit the checkpoint that the framework has just written to ``written``, if the path is in the store."""
        store = self._store
        if not store.holds(written):
            _log.info("%s was saved by the program's own saver, in files of its own: no manifest is written", written)
            return
        name = os.path.basename(written)
        self.adopt()
        store.commit_in_place(name, store.step_of(name), marks=marks)
        if name in store.pins.pinned:
            # Off the framework's list, it is not removed by the framework either.
            self.tell()
        # The framework prunes by itself, and knows nothing of manifests.
        store.forget_removed()

    def reject(self, written: str) -> None:
        """Quarantine the checkpoint that the framework has written to ``written``, so that no start restores it."""
        store = self._store
        if not store.holds(written):
            return
        name = os.path.basename(written)
        for one in store.candidates():
            if one.name == name:
                store.quarantine(one, "the NaN guard was on, and this step or one shortly before it was not finite")
        good = next((one for one in store.candidates() if one.is_committed), None)
        if good is not None:
            store.point_to(good)
