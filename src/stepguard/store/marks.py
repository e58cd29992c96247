"""What is noted of a checkpoint beside its files: the metrics of its step, its names, and whether it is kept.

Marks are part of the manifest. From the marks of all committed checkpoints follow the holders of names and the best:

- a name belongs to the checkpoint that was committed last of those that have it;
- the best are the first ``most`` by one metric. The rule stands in the manifests too, for readers.

Nothing else is stored, so a kill between two commits leaves nothing to repair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepguard.disk import schema

BEST = "best"
"""Stands for the best checkpoint where a step or a name is asked for."""

_MODES = ("min", "max")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}")
# JSON has no numbers for these.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class BestRule(NamedTuple):
    """Which checkpoints are the best: the ``most`` with the smallest (``"min"``) or largest (``"max"``) ``metric``."""

    metric: str
    mode: str
    most: int

    @classmethod
    def of(cls, given: tuple[str, str, int] | None) -> BestRule | None:
        """The rule in ``Saving(keep_best=...)``, if there is one."""
        # Plain, because JSON cannot encode NumPy's numbers.
        return None if given is None else cls(str(given[0]), str(given[1]), int(given[2]))

    def rank(self, value: float) -> float:
        """A number by which the best comes first."""
        return value if self.mode == "min" else -value


def check_name(name: object) -> None:
    """Check a name that is given to a checkpoint.

    Raises:
        TypeError: it is no text.
        ValueError: it could be taken for a step, for an option, or for a path.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a text such as 'before-lr-drop', got {type(name).__name__}: {name!r:.80}")
    if not _NAME.fullmatch(name) or name.isdigit() or name == BEST:
        raise ValueError(
            f"name must be a word such as 'before-lr-drop' (letters, digits and . _ + -), no number, and not "
            f"{BEST!r}, got {name!r:.120}"
        )


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks of one checkpoint.

    ``metrics`` were measured at its step. ``is_kept`` and ``names`` keep it until they are taken away. ``best`` is the
    rule of the run that committed it.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    is_kept: bool = False
    best: BestRule | None = None

    def __bool__(self) -> bool:
        """Whether anything is noted."""
        return self != Marks()

    def joined(self, other: Marks) -> Marks:
        """These and the ``other`` marks; of a metric that both have, the other's value."""
        names = tuple(dict.fromkeys([*self.names, *other.names]))
        metrics = {**self.metrics, **other.metrics}
        return Marks(metrics, names, self.is_kept or other.is_kept, other.best or self.best)

    def to_json(self) -> dict[str, Any]:
        """The fields for a manifest; only those that say something."""
        found: dict[str, Any] = {}
        if self.metrics:
            found["metrics"] = {name: _plain(value) for name, value in self.metrics.items()}
        if self.names:
            found["names"] = list(self.names)
        if self.is_kept:
            found["kept"] = True
        if self.best is not None:
            found["best"] = list(self.best)
        return found

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Marks:
        """The marks in the fields of a manifest. No restore needs them, so what is of another kind is passed over."""
        return cls(_metrics(body.get("metrics")), _names(body.get("names")), body.get("kept") is True, _rule(body))


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _metrics(found: object) -> dict[str, float]:
    if not isinstance(found, dict):
        return {}
    metrics = {}
    for name, value in found.items():
        if isinstance(value, str) and value in _NOT_FINITE:
            metrics[name] = _NOT_FINITE[value]
        elif isinstance(value, float) or schema.is_of(value, (int,)):
            metrics[name] = float(value)
    return metrics


def _names(found: object) -> tuple[str, ...]:
    if not isinstance(found, list):
        return ()
    return tuple(one for one in found if isinstance(one, str) and _NAME.fullmatch(one))


def _rule(body: Mapping[str, Any]) -> BestRule | None:
    found = body.get("best")
    if not isinstance(found, list) or len(found) != 3:
        return None
    metric, mode, most = found
    is_rule = isinstance(metric, str) and mode in _MODES and schema.is_of(most, (int,)) and most > 0
    return BestRule(metric, mode, most) if is_rule else None


@dataclass(frozen=True, slots=True)
class Marked:
    """The marks of the checkpoint ``name``, which was committed at ``time`` (Unix seconds)."""

    name: str
    step: int | None
    time: float
    marks: Marks


@dataclass(frozen=True, slots=True)
class Standing:
    """What follows from the marks of all checkpoints.

    ``best`` are the names of the best checkpoints, the best first. ``holders`` maps each name that was given to the
    checkpoint that has it. ``pinned`` are the checkpoints that the retention rules leave alone.
    """

    rule: BestRule | None
    best: tuple[str, ...]
    holders: Mapping[str, str]
    pinned: frozenset[str]

    def names_of(self, checkpoint: str) -> list[str]:
        """The names that belong to ``checkpoint``."""
        return [name for name, holder in self.holders.items() if holder == checkpoint]


def standing(found: Iterable[Marked], rule: BestRule | None = None) -> Standing:
    """Rank checkpoints by their marks; by default with the rule of the one that was committed last."""
    in_time = sorted(found, key=lambda one: one.time)
    holders = {name: one.name for one in in_time for name in one.marks.names}
    if rule is None:
        rule = next((one.marks.best for one in reversed(in_time) if one.marks.best is not None), None)
    best = tuple(one.name for one in _ranked(in_time, rule)[: rule.most]) if rule is not None else ()
    kept = [one.name for one in in_time if one.marks.is_kept]
    return Standing(rule, best, holders, frozenset([*best, *holders.values(), *kept]))


def _ranked(in_time: Iterable[Marked], rule: BestRule) -> list[Marked]:
    """Those with a finite value, the best first; of equal ones the older, so that a run at rest replaces nothing."""
    known = [one for one in in_time if math.isfinite(one.marks.metrics.get(rule.metric, math.nan))]
    return sorted(known, key=lambda one: rule.rank(one.marks.metrics[rule.metric]))
