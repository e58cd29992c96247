"""The files of a checkpoint, as :mod:`stepguard.orbax_files` describes them. Orbax restores it without Stepguard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stepguard.disk import files
from stepguard.errors import CheckpointCorruptError
from stepguard.jax.checkpoint.snapshot import JaxSnapshot
from stepguard.orbax_files import plain_values
from stepguard.orbax_files.index import Index, StoredLeaf, StoredPart
from stepguard.orbax_files.writing import Digests, offsets, write_data, write_index, write_small
from stepguard.store import manifest

ENGINE = "jax"
"""The name of this engine in the manifests of its checkpoints."""


def process_file(rank: int) -> str:
    """The file with the random states and the positions in the data of the process of ``rank``."""
    return f"process-{rank}.json"


def write_part(directory: Path, rank: int, snapshot: JaxSnapshot) -> Digests:
    """Write the arrays of this process, and for the chief, which waits for them, the places of those of another one.

    Writer thread. Raises OSError: the disk is full, or fails.
    """
    digests = write_data(directory, rank, (part.data for part in snapshot.parts))
    if rank:
        places = [[leaf, part.bounds, part.offset] for leaf, part in _placed(rank, snapshot)]
        digests[_places_file(rank)] = write_small(directory / _places_file(rank), json.dumps(places).encode())
    return digests


def write_tree(directory: Path, snapshot: JaxSnapshot, processes: int) -> Digests:
    """Write what the arrays are found by, once all processes have written their parts. Chief only.

    Writer thread. Raises OSError: the disk is full, or fails, or the part of a process is not there.
    """
    parts: list[list[StoredPart]] = [[] for _ in snapshot.leaves]
    for leaf, part in _placed(0, snapshot):
        parts[leaf].append(part)
    for rank in range(1, processes):
        for leaf, bounds, offset in json.loads(files.read_bytes(directory / _places_file(rank))):
            parts[leaf].append(StoredPart(rank, tuple(map(tuple, bounds)), offset))
    leaves = [
        StoredLeaf(one.keys, one.kind, one.shape, one.dtype, one.key_impl, one.weak, one.plain, found)
        for one, found in zip(snapshot.leaves, parts, strict=True)
    ]
    index = Index(leaves, snapshot.static)
    return write_index(directory, index, [one.chunk for one in snapshot.leaves], snapshot.empty)


def write_process(directory: Path, rank: int, values: Mapping[str, Any]) -> Digests:
    """Write the state of one process. Raises OSError: the disk is full, or fails."""
    name = process_file(rank)
    return {name: write_small(directory / name, plain_values.to_json(values))}


def read_process(directory: Path, rank: int) -> dict[str, Any] | None:
    """The state of the process of ``rank``; None if it took no part in the save.

    Raises:
        CheckpointCorruptError: it cannot be read.
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
    if not isinstance(found, dict):
        raise CheckpointCorruptError(f"{path}: expected the state of a process, found {found!r:.80}", path=path)
    return found


def _places_file(rank: int) -> str:
    return f"parts-{rank}.json"


def _placed(rank: int, snapshot: JaxSnapshot) -> list[tuple[int, StoredPart]]:
    """The parts of this process, each with the number of its leaf and its place in the file."""
    forms = [(part.index, np.dtype(snapshot.leaves[part.leaf_index].dtype)) for part in snapshot.parts]
    return [
        (part.leaf_index, StoredPart(rank, part.index, offset))
        for part, offset in zip(snapshot.parts, offsets(forms), strict=True)
    ]
