"""What a comparison of steps that were done again has found. By itself: a probe reads it, without what compares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the comparison of steps that were done again has found.

    The steps ``step`` to ``to_step`` were done again; ``compared`` of them were compared. ``outcome`` is "same",
    "differs" or "unknown". Where they differ, ``differs_at`` is the first step that does, and ``cause`` is one of
    "data", "random state", "hyperparameters", "state" and "computation", or ``None`` if the trace cannot tell.
    """

    step: int
    to_step: int
    outcome: str
    compared: int
    differs_at: int | None
    cause: str | None
    message: str

    def document(self) -> dict[str, Any]:
        """The fields, for the ledger and the heartbeat."""
        return asdict(self)
