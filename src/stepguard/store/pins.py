"""The pinned checkpoints of one store: the best, the named, and those that are to be kept."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping

from stepguard.errors import CheckpointError
from stepguard.store import verification
from stepguard.store.checkpoint import Checkpoint
from stepguard.store.layout import Layout
from stepguard.store.manifest import Manifest
from stepguard.store.marks import BEST, BestRule, Marked, Marks, Standing, standing


class Pins:
    """Knows the marks of all committed checkpoints, and which of them are pinned.

    The manifests are read once, when they are first needed. After that only the chief changes them, and tells it.
    ``rule`` is that of the run; without one, that of the run before counts, so that its best stay.

    Threads: one at a time, of the chief, changes what is known; it replaces the whole, so that any thread may ask.
    """

    def __init__(self, layout: Layout, rule: BestRule | None) -> None:
        self._layout = layout
        self.rule = rule
        self._known: Mapping[str, Marked] | None = None
        # The standing of what was known when it was computed.
        self._computed: tuple[Mapping[str, Marked], Standing] | None = None

    def load(self, found: Iterable[Checkpoint]) -> None:
        """Read the marks of these checkpoints. Damaged manifests do not matter here."""
        known = {}
        for one in found:
            if one.is_committed and one.root == self._layout.root:
                with contextlib.suppress(CheckpointError, OSError):
                    manifest = verification.read_manifest(self._layout, one.name)
                    # Of thousands, only those that say something.
                    if manifest is not None and manifest.marks:
                        known[one.name] = _marked(manifest)
        self._known = known

    def note(self, manifest: Manifest) -> None:
        """Note the marks of a checkpoint that was committed or marked just now."""
        known = {name: one for name, one in self._all().items() if name != manifest.name}
        if manifest.marks:
            known[manifest.name] = _marked(manifest)
        self._known = known

    def forget_missing(self) -> bool:
        """Forget checkpoints that somebody has removed; return whether there were any."""
        known = self._all()
        left = {name: one for name, one in known.items() if os.path.lexists(self._layout.manifest(name))}
        if len(left) < len(known):
            self._known = left
        return len(left) < len(known)

    def marks_of(self, name: str) -> Marks:
        """The marks of the checkpoint ``name``."""
        found = self._all().get(name)
        return Marks() if found is None else found.marks

    def handed_on(self, name: str, marks: Marks | None) -> Marks:
        """The marks of a checkpoint that is about to be committed: ``marks``, and the names of the one it replaces."""
        before = self.marks_of(name)
        # Not its metrics, because the step may have been done again in another way.
        kept = Marks(names=before.names, is_kept=before.is_kept)
        return kept.joined(Marks() if marks is None else marks)

    @property
    def standing(self) -> Standing:
        """What follows from the marks."""
        known, computed = self._all(), self._computed
        if computed is None or computed[0] is not known:
            computed = self._computed = known, standing(known.values(), self.rule)
        return computed[1]

    @property
    def pinned(self) -> frozenset[str]:
        """The names of the pinned checkpoints."""
        return self.standing.pinned

    def meant(self, asked: int | str, found: Iterable[Checkpoint]) -> Checkpoint | None:
        """Return the one of ``found`` that is of this step, is the ``"best"``, or has this name; None if none is."""
        if not isinstance(asked, str):
            return next((one for one in found if one.step == asked), None)
        known = self.standing
        name = next(iter(known.best), None) if asked == BEST else known.holders.get(asked, asked)
        return next((one for one in found if one.name == name), None)

    def would_be_best(self, name: str, value: float) -> bool:
        """Whether the checkpoint ``name``, with this value of the metric, is or would be one of the best."""
        rule = self.rule
        if rule is None or not math.isfinite(value):
            return False
        others = [one for one in self.standing.best if one != name]
        if len(others) < rule.most:
            return True
        worst = self.marks_of(others[rule.most - 1]).metrics[rule.metric]
        return rule.rank(value) < rule.rank(worst)

    def _all(self) -> Mapping[str, Marked]:
        if self._known is None:
            self.load(self._layout.candidates())
        assert self._known is not None
        return self._known


def _marked(manifest: Manifest) -> Marked:
    return Marked(manifest.name, manifest.step, manifest.time, manifest.marks)
