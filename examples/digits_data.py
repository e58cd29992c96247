"""The handwritten digits that the examples learn: where they come from is in data/ATTRIBUTION.md."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

CSV_PATH = Path(__file__).parent / "data" / "digits.csv.gz"


class Digits(NamedTuple):
    """``images``: uint8 ``[n, 64]``, 8 x 8 pixels row by row, 0 (white) to 16 (black). ``labels``: uint8 ``[n]``."""

    images: np.ndarray
    labels: np.ndarray


def load() -> tuple[Digits, Digits]:
    """Return 1,438 digits to train on and 359 to test with, always the same: every fifth digit is for the test."""
    with gzip.open(CSV_PATH, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    for_test = np.arange(len(rows)) % 5 == 4
    return _digits(rows[~for_test]), _digits(rows[for_test])


def _digits(rows: np.ndarray) -> Digits:
    return Digits(images=rows[:, :64], labels=rows[:, 64])
