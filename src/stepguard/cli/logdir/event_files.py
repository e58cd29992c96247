"""Scalars from TensorBoard's event files, as TensorBoard shows them, read by its own package without TensorFlow.

After a restart (session log START), TensorBoard drops the values of the killed run for later steps. It reads a file up
to a truncated record, and a file that is still being written up to its current end.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepguard.cli.exits import NOT_DONE, CommandError


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


def event_files(logdir: Path) -> list[Path]:
    """The event files in a directory."""
    return sorted(path for path in logdir.glob("*tfevents*") if path.is_file())


def read_curves(logdir: Path, tags: Sequence[str]) -> list[Curve]:
    """The curves in the event files of ``logdir``, sorted by tag; those that match one of ``tags``, if there are any.

    Raises CommandError if the tensorboard package is not installed.
    """
    accumulator, make_ndarray = _load(logdir)
    found = []
    for tag in sorted(accumulator.Tags()["tensors"]):
        if accumulator.SummaryMetadata(tag).plugin_data.plugin_name != "scalars":
            continue
        if tags and not any(fnmatch.fnmatchcase(tag, pattern) for pattern in tags):
            continue
        points = accumulator.Tensors(tag)
        values = tuple(float(make_ndarray(one.tensor_proto).item()) for one in points)
        found.append(Curve(tag, tuple(one.step for one in points), tuple(one.wall_time for one in points), values))
    return [one for one in found if one.steps]


def _load(logdir: Path) -> tuple[Any, Any]:
    # With this module the tensorboard package reads by itself; without it, it imports TensorFlow, which takes seconds.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    try:
        from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise CommandError(
            f"event files cannot be read without the tensorboard package ({error}): pip install 'stepguard[events]'",
            NOT_DONE,
        ) from error
    # It warns at each restart whose later steps it drops, which is wanted here.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    # All scalars, and of images and histograms, which are not looked at, no more than one.
    accumulator = EventAccumulator(str(logdir), size_guidance={"tensors": 1}, tensor_size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator, make_ndarray
