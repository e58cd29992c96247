"""Runs of Orbax's ``CheckpointManager``: a directory for each step, named by it."""

from __future__ import annotations

import re
from pathlib import Path

from stepguard.disk.schema import MOST_DIGITS
from stepguard.orbax_files.reading import is_checkpoint

# An optional prefix, and the step. Orbax gives a directory this name when all in it is written.
_STEP = re.compile(rf"(?:[A-Za-z0-9.-]+_)?([0-9]{{1,{MOST_DIGITS}}})")


def steps_of_orbax(root: Path) -> list[tuple[int, Path]]:
    """The finished checkpoints of a ``CheckpointManager`` in the directory ``root``, newest first."""
    found = []
    if root.is_dir():
        for path in root.iterdir():
            match = _STEP.fullmatch(path.name)
            if match is not None and path.is_dir() and not path.is_symlink() and is_checkpoint(path):
                found.append((int(match.group(1)), path))
    return sorted(found, reverse=True)


def newest_of_orbax(root: Path) -> tuple[int, Path] | None:
    """The newest of `steps_of_orbax`: its step and path."""
    return next(iter(steps_of_orbax(root)), None)
