"""The state of one step as it was taken, in host memory, and the files that the processes of a run write of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError
from stepguard.orbax_files import plain_values
from stepguard.orbax_files.index import Bounds, Index, Keys, StoredLeaf, StoredPart, kind_of
from stepguard.orbax_files.writing import Digests, offsets, write_data, write_index, write_small
from stepguard.steps.process_file import checked_state
from stepguard.steps.random_streams import RandomStreams
from stepguard.store import manifest

ENGINE = "jax"
"""The name in the manifests of the engine whose checkpoints these are."""


@dataclass(slots=True)
class Part:
    """A shard that this process writes: ``bounds`` are those of the shard in the whole leaf.

    ``data`` is an array of the device until the state is in host memory, and then one of NumPy's.
    """

    leaf_index: int
    bounds: Bounds
    data: Any


@dataclass(slots=True)
class Taken:
    """All leaves, which are the same in every process, and the parts of them that this process writes.

    ``chunks`` are the shapes of the shards of each leaf, which are an even grid. ``static`` and ``empty``: see
    `stepguard.orbax_files.leaves.Flat`. The leaves have no places yet.
    """

    leaves: Sequence[StoredLeaf]
    chunks: Sequence[tuple[int, ...]]
    static: Mapping[str, str]
    empty: Mapping[Keys, str]
    parts: Sequence[Part]

    def not_finite(self) -> list[str]:
        """The names of the leaves with NaN or infinity, and of plain numbers that are NaN, once all is in memory."""
        bad = {part.leaf_index for part in self.parts if not _is_finite(part.data)}
        bad |= {
            n for n, leaf in enumerate(self.leaves) if leaf.kind in ("float", "complex") and leaf.plain != leaf.plain
        }
        return [self.leaves[n].name for n in sorted(bad)]


def _is_finite(data: np.ndarray[Any, Any]) -> bool:
    if kind_of(data.dtype) not in "fc" or not data.size:
        return True
    if data.dtype.itemsize > 2 and data.dtype.kind == "f":
        # One pass and no copy. If any number is NaN, then minimum and maximum are NaN.
        with np.errstate(invalid="ignore"):
            return bool(np.isfinite(data.min()) and np.isfinite(data.max()))
    return bool(np.isfinite(data).all())


def process_file(rank: int) -> str:
    """The file with the random states and the positions in the data of the process of ``rank``."""
    return f"process-{rank}.json"


def write_part(directory: Path, rank: int, taken: Taken) -> Digests:
    """Write the arrays of this process, and for the chief, which waits for them, the places of those of another one.

    Writer thread. Raises OSError: the disk is full, or fails.
    """
    digests = write_data(directory, rank, (part.data for part in taken.parts))
    if rank:
        places = [[leaf, part.bounds, part.offset] for leaf, part in _placed(rank, taken)]
        digests[_places_file(rank)] = write_small(directory / _places_file(rank), json.dumps(places).encode())
    return digests


def write_tree(directory: Path, taken: Taken, processes: int) -> Digests:
    """Write what the arrays are found by, once all processes have written their parts. Chief only.

    Writer thread. Raises OSError: the disk is full, or fails, or the part of a process is not there.
    """
    parts: list[list[StoredPart]] = [[] for _ in taken.leaves]
    for leaf, part in _placed(0, taken):
        parts[leaf].append(part)
    for rank in range(1, processes):
        for leaf, bounds, offset in json.loads(files.read_bytes(directory / _places_file(rank))):
            parts[leaf].append(StoredPart(rank, tuple(map(tuple, bounds)), offset))
    leaves = [dataclasses.replace(one, parts=found) for one, found in zip(taken.leaves, parts, strict=True)]
    return write_index(directory, Index(leaves, taken.static), taken.chunks, taken.empty)


def write_process(directory: Path, rank: int, values: Mapping[str, Any]) -> Digests:
    """Write the state of one process. Raises OSError: the disk is full, or fails."""
    name = process_file(rank)
    return {name: write_small(directory / name, plain_values.to_json(values))}


def read_process(directory: Path, rank: int) -> dict[str, Any] | None:
    """The state of the process of ``rank``; None if it took no part in the save.

    Raises:
        CheckpointCorruptError: it cannot be read, or holds something else.
    """
    path = directory / process_file(rank)
    named = manifest.named_files(directory)
    if named is not None and path not in named:
        return None
    try:
        found = plain_values.from_json(files.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointCorruptError(f"{path}: expected the state of a process: {error}", path=path) from error
    return checked_state(found, path, RandomStreams())


def _places_file(rank: int) -> str:
    return f"parts-{rank}.json"


def _placed(rank: int, taken: Taken) -> list[tuple[int, StoredPart]]:
    """The parts of this process, each with the number of its leaf and its place in the file."""
    forms = [(part.bounds, np.dtype(taken.leaves[part.leaf_index].dtype)) for part in taken.parts]
    return [
        (part.leaf_index, StoredPart(rank, part.bounds, offset))
        for part, offset in zip(taken.parts, offsets(forms), strict=True)
    ]
