"""The files of sharded state, in the format of ``torch.distributed.checkpoint``.

Besides its other files, a checkpoint has the files ``__RANK_0.distcp``, one with the part of each process, and
``.metadata``, which says where in them each tensor is. Frozen parameters may be in a second file of each process,
``__RANK_1.distcp``. ``torch.distributed.checkpoint`` reads all of them without Stepguard.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

# This record's name is private but part of the format: every checkpoint refers to it.
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from stepguard.disk import files
from stepguard.disk.new_file import NewFile
from stepguard.errors import CheckpointCorruptError
from stepguard.torch.checkpoint import unpickling
from stepguard.torch.checkpoint.files import append
from stepguard.torch.checkpoint.sharded_tensors import Shard, name_of, parts, whole

METADATA = ".metadata"

_PART = re.compile(r"__\d+_[01]\.distcp")
_FORMAT_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class Part:
    """A file that one process has written: the place of each item, and the size and digest of the file."""

    results: Sequence[Any]
    name: str
    size: int
    digest: str


class SavePlanner(DefaultSavePlanner):
    """Plans which parts of the states of sharded objects each process writes; ``states`` has them by name.

    If several processes have the same value, such as a buffer that is not sharded, the lowest rank writes it.
    ``frozen`` has the names, in the states, of what gets a file of its own.
    """

    def __init__(self, states: Mapping[str, Any], frozen: Mapping[str, Collection[str]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)
        found = {path: part for name, state in states.items() for path, part in parts(name, state).items()}
        self._paths = {name_of(path): path for path in found}
        self._frozen = {name_of((part, name)) for part, names in frozen.items() for name in names}
        self.set_up_planner({name_of(path): part for path, part in found.items()})

    def create_local_plan(self) -> Any:
        """The parts that this process has, and the path of each part, by which a reader rebuilds the states."""
        plan = super().create_local_plan()
        return type(plan)(plan.items, planner_data=self._paths)

    def create_global_plan(self, all_plans: list[Any]) -> tuple[list[Any], Any]:
        """The parts that each process writes, and the metadata of all parts."""
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data = {name: path for plan in reversed(all_plans) for name, path in plan.planner_data.items()}
        return plans, metadata

    def lookup_object(self, index: Any) -> Any:
        """The tensor or value to write."""
        found = self.state_dict[index.fqn]
        return found.local if isinstance(found, Shard) else found

    def is_frozen(self, item: Any) -> bool:
        """Whether an item of a plan goes to the file of the frozen parameters."""
        return item.index.fqn in self._frozen


def write_parts(directory: Path, rank: int, planner: SavePlanner, plan: Any) -> list[Part]:
    """Write the parts that ``plan`` assigns to this process. The files are not durable yet."""
    frozen = [item for item in plan.items if planner.is_frozen(item)]
    rest = [item for item in plan.items if not planner.is_frozen(item)]
    parts = [_write_part(directory, f"__{rank}_0.distcp", planner, rest)]
    return [*parts, _write_part(directory, f"__{rank}_1.distcp", planner, frozen)] if frozen else parts


def _write_part(directory: Path, name: str, planner: SavePlanner, items: Sequence[Any]) -> Part:
    results = []
    with NewFile(directory / name) as file:
        for item in items:
            begin = file.size
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                file.write(data.getbuffer())
            else:
                append(file, data)
            length = file.size - begin
            results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
        return Part(results, name, file.size, file.digest)


def write_metadata(directory: Path, metadata: Any, written: Sequence[Part]) -> None:
    """Write the place of each part, once all processes have written their files."""
    metadata.storage_data = {one.index: one.storage_data for part in written for one in part.results}
    metadata.version = _FORMAT_VERSION
    files.write(directory / METADATA, pickle.dumps(metadata))


class ShardedFiles:
    """The sharded state in a checkpoint. Any number of processes may each read the parts that they need.

    Raises:
        CheckpointError: ``.metadata`` names something that could run code.
        CheckpointCorruptError: ``.metadata`` is not in the format of ``torch.distributed.checkpoint``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / METADATA
        metadata = unpickling.loads(files.read_bytes(path), path)
        if not _is_sound(metadata):
            raise CheckpointCorruptError(f"{path}: expected the metadata of a checkpoint in {directory}", path=path)
        self._metadata = metadata

    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """The size and type of each tensor, by name. Other values are ignored, because they are pickled."""
        stored = self._metadata.state_dict_metadata
        return {
            name: (one.size, one.properties.dtype)
            for name, one in stored.items()
            if isinstance(one, TensorStorageMetadata)
        }

    def read_whole(self, name: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """One whole tensor. Raises as :meth:`read` does."""
        tensor = torch.empty(size, dtype=dtype)
        self.read({name: Shard(tensor, size, [whole(size)])})
        return tensor

    def read(self, targets: Mapping[str, Shard]) -> None:
        """Fill each shard of ``targets`` with its part of the tensor of that name.

        Raises:
            CheckpointError: a file holds something that could run code.
            CheckpointCorruptError: a tensor is missing, or its shape differs from the rest of the checkpoint.
        """
        items = []
        for name, target in targets.items():
            if not target.size.numel():
                continue
            stored = self._metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata) or stored.size != target.size:
                found = list(stored.size) if isinstance(stored, TensorStorageMetadata) else "none"
                raise CheckpointCorruptError(
                    f"{self._directory / METADATA}: expected a tensor {name} of {list(target.size)}, found {found}",
                    path=self._directory / METADATA,
                )
            items += create_read_items_for_chunk_list(name, stored, target.__create_chunk_list__())
        reader = FileSystemReader(self._directory)
        reader.set_up_storage_reader(self._metadata, False)
        try:
            reader.read_data(LoadPlan(items), _Targets(targets)).wait()
        except pickle.UnpicklingError as error:
            raise unpickling.refused(self._directory, error) from None


class _Targets(DefaultLoadPlanner):
    def __init__(self, targets: Mapping[str, Shard]) -> None:
        super().__init__()
        self._targets = targets

    def lookup_tensor(self, index: Any) -> torch.Tensor:
        return self._targets[index.fqn].local

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise CheckpointCorruptError(f"{read_item.storage_index.fqn}: expected a tensor, found {value!r}")


def _is_sound(metadata: Any) -> bool:
    """Whether ``metadata`` is in the known format and leads only to files in its own directory."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        return False
    return isinstance(metadata.state_dict_metadata, dict) and all(
        isinstance(one, _StorageInfo)
        and isinstance(one.relative_path, str)
        and _PART.fullmatch(one.relative_path)
        and not getattr(one, "transform_descriptors", None)
        for one in metadata.storage_data.values()
    )
