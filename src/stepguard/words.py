"""Lists and durations as text, the same in every message, line and table."""

from __future__ import annotations

from collections.abc import Iterable


def listed(items: Iterable[str], *, most: int = 5, separator: str = ", ") -> str:
    """Join ``items``; if there are more than ``most``, join the first ``most`` and say how many more there are."""
    shown = list(items)
    more = f"{separator}and {len(shown) - most} more" if len(shown) > most else ""
    return separator.join(shown[:most]) + more


def duration(secs: float) -> str:
    """``secs`` as ``42 s``, ``3 min``, ``2 h 05 min`` or ``3 d 4 h``; a negative duration counts as 0."""
    secs = max(0.0, secs)
    if secs < 100:
        return f"{int(secs)} s"
    minutes = round(secs / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
