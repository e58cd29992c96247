"""An event log for tests."""

from __future__ import annotations

from typing import Any


class RecordedEvents:
    """An event log that keeps what it was told, as tuples in the order in which it came."""

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []
        self.is_open = True

    def started(self, step: int) -> None:
        """The record of a start."""
        self.records.append(("started", step))

    def checkpointed(self, step: int | None, path: str) -> None:
        """The record of a checkpoint."""
        self.records.append(("checkpointed", step, path))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One value of a curve; the value itself depends on time and is left out."""
        self.records.append(("scalar", tag, step))

    def stopped(self) -> None:
        """The record of a stop."""
        self.records.append(("stopped",))

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Close the log."""
        self.is_open = False

    def reopen(self) -> None:
        """Open the log again."""
        self.is_open = True
