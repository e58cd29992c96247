"""What a mismatch is, in every framework: a good checkpoint that does not fit the program, told part by part."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepguard.words import listed

_MOST_NAMED = 10


@dataclass(slots=True)
class Mismatch:
    """The parts of a state by name: those that only the program has (``missing``), those that only the checkpoint
    holds (``unexpected``), and those of another shape, type or kind in each (``reshaped``: expected, found).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.missing or self.unexpected or self.reshaped)

    def add(self, other: Mismatch) -> None:
        """Take over the differences of ``other``."""
        self.missing += other.missing
        self.unexpected += other.unexpected
        self.reshaped.update(other.reshaped)

    def __str__(self) -> str:
        """The differences, the first few of each kind by name."""
        parts = []
        if self.missing:
            parts.append(f"the program has {listed(self.missing, most=_MOST_NAMED)}, and the checkpoint does not")
        if self.unexpected:
            parts.append(f"the checkpoint holds {listed(self.unexpected, most=_MOST_NAMED)}, and the program does not")
        if self.reshaped:
            pairs = [f"{name} (expected {has}, found {held})" for name, (has, held) in self.reshaped.items()]
            parts.append(f"of another shape or type: {listed(pairs, most=_MOST_NAMED)}")
        return "; ".join(parts)
