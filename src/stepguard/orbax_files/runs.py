"""Runs of Orbax's ``CheckpointManager``: a directory for each step, named by it."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable
from pathlib import Path

from stepguard.disk.schema import MOST_DIGITS
from stepguard.errors import CheckpointCorruptError
from stepguard.orbax_files.index import STATE_FILE
from stepguard.orbax_files.reading import is_checkpoint
from stepguard.store import Checkpoint, CheckpointStore
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX
from stepguard.words import logger

_log = logger(__name__)

# An optional prefix, and the step. Orbax gives a directory this name when all in it is written.
_STEP = re.compile(rf"(?:[A-Za-z0-9.-]+_)?([0-9]{{1,{MOST_DIGITS}}})")


def step_of(name: str) -> int | None:
    """The step in the name of a directory that a ``CheckpointManager`` has made; None for any other name."""
    match = _STEP.fullmatch(name)
    return None if match is None else int(match.group(1))


def steps_of_orbax(root: Path) -> list[tuple[int, Path]]:
    """The finished checkpoints of a ``CheckpointManager`` in the directory ``root``, newest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        step = step_of(path.name)
        with contextlib.suppress(OSError):  # What cannot be read is no checkpoint.
            if step is not None and path.is_dir() and not path.is_symlink() and is_checkpoint(path):
                found.append((step, path))
    return sorted(found, reverse=True)


def restore_newest_of_orbax(root: Path, newer_than: int, load: Callable[[Path, int], None]) -> Checkpoint | None:
    """Restore the newest checkpoint of a ``CheckpointManager`` that ``load(path, step)`` can read.

    One that cannot be read is passed over with a warning. None is tried whose step is not above ``newer_than``, because
    the run has gone on from it.

    Raises:
        CheckpointMismatchError: the checkpoint does not fit the program.
    """
    for step, path in steps_of_orbax(root):
        if step <= newer_than:
            return None
        try:
            load(path, step)
        except (CheckpointCorruptError, OSError) as error:
            _log.warning("%s, which Orbax has written, is passed over, since it cannot be read: %s", path, error)
        else:
            return Checkpoint(root, path.name, step, path.stat().st_mtime, is_committed=False)
    return None


def newest_at(place: Path, engine: str) -> Path:
    """The checkpoint at ``place``, or the newest good one of the run there: of ``engine``, or of Orbax.

    Raises:
        FileNotFoundError: there is none, or only some of another basename.
        NoGoodCheckpointError: there are some, and all are damaged.
    """
    if (place / STATE_FILE).is_file():
        return place
    good = CheckpointStore(place, engine=engine).newest_good(quarantine=False).checkpoint
    found = [] if good is None else [good.path]
    for path in [*found, *(path for _, path in steps_of_orbax(place))]:
        return path
    # The checkpoints in a logdir look like the items of one that Orbax has written.
    if any(place.glob("*" + MANIFEST_SUFFIX)):
        wanted = "checkpoints that are called model.ckpt-STEP; for others give the path of one"
        raise FileNotFoundError(errno.ENOENT, f"expected {wanted}", str(place))
    if is_checkpoint(place):
        return place
    raise FileNotFoundError(errno.ENOENT, "expected a checkpoint of Stepguard or Orbax, or a run's logdir", str(place))
