"""A mismatch, in every framework: the parts in which a good checkpoint does not fit the program."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepguard.words import listed

_MOST_NAMED = 10


@dataclass(slots=True)
class Mismatch:
    """The differences between program and checkpoint, by name: parts that only the program has (``missing``), that only
    the checkpoint holds (``unexpected``), or whose shape, type or kind differs (``reshaped``: expected, found).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.missing or self.unexpected or self.reshaped)

    def add(self, other: Mismatch) -> None:
        """Add the differences of ``other``."""
        self.missing += other.missing
        self.unexpected += other.unexpected
        self.reshaped.update(other.reshaped)

    def __str__(self) -> str:
        """Describe the differences; name the first few of each kind."""
        parts = []
        if self.missing:
            parts.append(f"the program has {listed(self.missing, most=_MOST_NAMED)}, and the checkpoint does not")
        if self.unexpected:
            parts.append(f"the checkpoint holds {listed(self.unexpected, most=_MOST_NAMED)}, and the program does not")
        if self.reshaped:
            pairs = [f"{name} (expected {has}, found {held})" for name, (has, held) in self.reshaped.items()]
            parts.append(f"of another shape or type: {listed(pairs, most=_MOST_NAMED)}")
        return "; ".join(parts)
