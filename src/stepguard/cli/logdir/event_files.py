"""Scalars from TensorBoard's event files, as TensorBoard shows them, read by its own package without TensorFlow.

After a restart (session log START), TensorBoard drops the values of the killed run for later steps. It reads a file up
to a truncated record, and a file that is still being written up to its current end.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepguard.cli import interrupts
from stepguard.cli.exits import NOT_DONE, CommandError
from stepguard.cli.logdir import event_records
from stepguard.disk import files

# Of records that cannot be read: after so many the rest is not read either.
_MOST_LOST = 1000


@dataclass(frozen=True, slots=True)
class Curve:
    """The values of one tag, in the order of writing; after a restart was dropped, that is the order of the steps."""

    tag: str
    steps: tuple[int, ...]
    times: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def finite(self) -> list[float]:
        """The values that are neither NaN nor infinite."""
        return [one for one in self.values if math.isfinite(one)]


@dataclass(frozen=True, slots=True)
class EventFiles:
    """The event files in a directory; ``unreadable`` says of those that cannot be read why, in a line each."""

    paths: tuple[Path, ...]
    unreadable: tuple[str, ...] = ()


def event_files(logdir: Path) -> EventFiles:
    """The event files in ``logdir``. What is no file, or cannot be opened, is unreadable. Raises OSError."""
    found, unreadable = [], []
    for name in sorted(one for one in os.listdir(logdir) if "tfevents" in one):
        try:
            os.close(files.open_regular(logdir / name))
        except FileNotFoundError:
            continue  # It was removed just now.
        except OSError as error:
            unreadable.append(f"{logdir / name}: could not be read: {error.strerror or error}")
        else:
            found.append(logdir / name)
    return EventFiles(tuple(found), tuple(unreadable))


def read_curves(
    paths: Sequence[Path], tags: Sequence[str] = (), *, most_points: int | None = None, extra: str = "events"
) -> tuple[list[Curve], int]:
    """The curves in event files of one directory, sorted by tag; those that match one of ``tags``, if there are any.

    The second value is the number of records that could not be read, and were passed over. A value that is no single
    number is passed over too. Of more than ``most_points`` records in all, each curve has some at even distances.
    Raises CommandError, which names ``extra``, if the tensorboard package is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="stepguard-") as place:
        accumulator, make_ndarray = _load(place, extra)
        # The package reads a directory, and opens whatever in it is called an event file.
        if most_points is None or not event_records.thin(paths, Path(place), most_points):
            for path in paths:
                os.symlink(path.absolute(), os.path.join(place, path.name))
        lost = _read_all(accumulator)
    found = []
    for tag in sorted(accumulator.Tags()["tensors"]):
        if not _is_scalar(accumulator, tag):
            continue
        if tags and not any(fnmatch.fnmatchcase(tag, pattern) for pattern in tags):
            continue
        points = [
            (one, value)
            for one in accumulator.Tensors(tag)
            if (value := _number(make_ndarray, one.tensor_proto)) is not None
        ]
        steps, times = tuple(one.step for one, _ in points), tuple(one.wall_time for one, _ in points)
        found.append(Curve(tag, steps, times, tuple(value for _, value in points)))
    return [one for one in found if one.steps], lost


def _read_all(accumulator: Any) -> int:
    """Read the files to their ends. Returns the number of records that were passed over."""
    for lost in range(_MOST_LOST):
        try:
            accumulator.Reload()
        except Exception:  # noqa: BLE001 - whatever the package raises for what somebody has written
            continue  # It goes on behind the record.
        return lost
    return _MOST_LOST


def _is_scalar(accumulator: Any, tag: str) -> bool:
    try:
        return bool(accumulator.SummaryMetadata(tag).plugin_data.plugin_name == "scalars")
    except KeyError:
        return False  # It has none.


def _number(make_ndarray: Any, tensor: Any) -> float | None:
    # First of all the size: a few bytes may stand for an array that fills the memory.
    if any(one.size != 1 for one in tensor.tensor_shape.dim):
        return None
    try:
        return float(make_ndarray(tensor).item())
    except Exception:  # noqa: BLE001 - as in _read_all
        return None


def _load(place: str, extra: str) -> tuple[Any, Any]:
    # With this module the tensorboard package reads by itself; without it, it imports TensorFlow, which takes seconds.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    try:
        with interrupts.held():
            from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
            from tensorboard.util.tensor_util import make_ndarray
    except (ImportError, AttributeError) as error:  # An old one beside NumPy 2 lacks names.
        raise CommandError(
            f"event files cannot be read without the tensorboard package ({error}): pip install 'stepguard[{extra}]'",
            NOT_DONE,
        ) from error
    # It warns at each restart whose later steps it drops, which is wanted here.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    # All scalars, and of images and histograms, which are not looked at, no more than one.
    accumulator = EventAccumulator(place, size_guidance={"tensors": 1}, tensor_size_guidance={"scalars": 0})
    return accumulator, make_ndarray
