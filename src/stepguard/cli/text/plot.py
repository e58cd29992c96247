"""A curve drawn with the dots of Braille characters: two across and four down in each.

Not plotext's: its versions 5 and 6 have nothing in common, and 6.1 ends the process at a NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

_EMPTY = 0x2800
# The bit of each dot: by column, from the top down.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def plotted(title: str, xs: Sequence[float], ys: Sequence[float], *, width: int, height: int) -> str:
    """The curve as lines of text, ``width`` columns wide, ``height`` lines for the curve itself, and an axis.

    Values that are not finite are gaps.
    """
    finite = [y for y in ys if math.isfinite(y)]
    if not finite:
        return f"{title}: no finite value"
    low, high = min(finite), max(finite)
    labels = [""] * height
    labels[0], labels[-1] = f"{high:.4g}", f"{low:.4g}"
    margin = max(map(len, labels))
    columns = max(2, width - margin - 2)
    rows = _canvas(xs, ys, (min(xs), max(xs)), (low, high), columns, height)
    lines = [f"{' ' * (margin + 2)}{title:^{columns}}".rstrip()]
    lines += [f"{label:>{margin}} ┤{row}" for label, row in zip(labels, rows, strict=True)]
    first, last = f"{min(xs):g}", f"{max(xs):g}"
    lines.append(f"{' ' * margin} └{'─' * columns}")
    lines.append(f"{' ' * (margin + 2)}{first}{last:>{max(0, columns - cell_len(first))}}")
    return "\n".join(lines)


def _canvas(
    xs: Sequence[float],
    ys: Sequence[float],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    columns: int,
    height: int,
) -> list[str]:
    cells = [[_EMPTY] * columns for _ in range(height)]

    def at(x: float, y: float) -> tuple[int, int]:
        down = height * 4 - 1 - _scaled(y, *y_range, height * 4 - 1)
        return _scaled(x, *x_range, columns * 2 - 1), down

    points = [at(x, y) if math.isfinite(y) else None for x, y in zip(xs, ys, strict=True)]
    for before, after in itertools.pairwise([None, *points]):
        if after is None:
            continue
        for across, down in _line(before or after, after):
            cells[down // 4][across // 2] |= _DOTS[across % 2][down % 4]
    return ["".join(map(chr, row)).replace(chr(_EMPTY), " ").rstrip() for row in cells]


def _scaled(value: float, low: float, high: float, size: int) -> int:
    # Halves, because the difference of two floats may overflow.
    span = high / 2 - low / 2
    return round((value / 2 - low / 2) / span * size) if span > 0 else size // 2


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    across, down = end[0] - start[0], end[1] - start[1]
    count = max(abs(across), abs(down), 1)
    for number in range(count + 1):
        yield start[0] + round(across * number / count), start[1] + round(down * number / count)
