"""An event log for tests, which records its calls."""

from __future__ import annotations

from typing import Any


class RecordedEvents:
    """An event log that records each call as a tuple, in order, in ``records``."""

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []
        self.is_open = True

    def started(self, step: int) -> None:
        """Record a start."""
        self.records.append(("started", step))

    def checkpointed(self, step: int | None, path: str) -> None:
        """Record a checkpoint."""
        self.records.append(("checkpointed", step, path))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Record a value of a curve by tag and step; the value itself depends on time and is left out."""
        self.records.append(("scalar", tag, step))

    def stopped(self) -> None:
        """Record a stop."""
        self.records.append(("stopped",))

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        """Close the log."""
        self.is_open = False

    def reopen(self) -> None:
        """Open the log again."""
        self.is_open = True
