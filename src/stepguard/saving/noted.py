"""What the program says of its steps, until the checkpoints of these steps have it in their manifests."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from stepguard.store.marks import BestRule, Marks

# A step that nobody has saved is of no use after so many others.
_MOST_STEPS = 64


class Noted:
    """The marks of steps, by the step. Any thread.

    ``rule`` is noted with each step that has its metric, so that a reader of the checkpoints knows which are the best.
    """

    def __init__(self, rule: BestRule | None = None) -> None:
        self.rule = rule
        self._lock = threading.Lock()
        self._marks: dict[int | None, Marks] = {}

    def add(self, step: int | None, *, metrics: Mapping[str, float] | None = None, name: str | None = None) -> None:
        """Note metrics that were measured at ``step``, or a name for it."""
        rule = self.rule if self.rule is not None and metrics is not None and self.rule.metric in metrics else None
        said = Marks(dict(metrics or {}), () if name is None else (name,), best=rule)
        with self._lock:
            # The newest last, so that the oldest go first.
            self._marks[step] = self._marks.pop(step, Marks()).joined(said)
            for old in list(self._marks)[:-_MOST_STEPS]:
                del self._marks[old]

    def of(self, step: int | None) -> Marks:
        """What was said of ``step``."""
        with self._lock:
            return self._marks.get(step, Marks())

    def forget_after(self, step: int | None) -> None:
        """Forget what was said of later steps, which are done again in another way."""
        with self._lock:
            self._marks = {one: marks for one, marks in self._marks.items() if one is None or one <= (step or 0)}
