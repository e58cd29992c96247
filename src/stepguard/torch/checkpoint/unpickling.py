"""Reading what ``torch.distributed.checkpoint`` pickles, without running code from it.

Its ``.metadata`` is a plain pickle, which may name any function of any module and have it called. Here a pickle may
name only the records of that package, and what they hold.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from stepguard.errors import CheckpointCorruptError, CheckpointError

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.storage": {"WriteResult"},
    # The first is a class; the second finds a layout (torch.strided) by its name, and does nothing else.
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
}


def loads(content: bytes, path: Path | None = None) -> Any:
    """What was pickled. ``path`` is the file that it comes from, for the error.

    Raises:
        CheckpointError: it names something else than the records of ``torch.distributed.checkpoint``.
        CheckpointCorruptError: it is no pickle.
    """
    try:
        return _RecordUnpickler(content, path).load()
    except CheckpointError:
        raise
    # Of what else a damaged pickle raises, the documentation gives no complete list.
    except Exception as error:
        raise CheckpointCorruptError(
            f"{path}: expected the records of torch.distributed.checkpoint, found {len(content)} bytes that are none "
            f"({type(error).__name__}: {error})",
            path=path,
        ) from error


class _RecordUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Path | None) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"{self._path}: expected only the records of torch.distributed.checkpoint, found a reference to "
            f"{module}.{name}, which could run code: nothing of this file was used. If you know who wrote it, load it "
            f"with torch.distributed.checkpoint itself; else remove the checkpoint",
            path=self._path,
        )

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError(f"{self._path}: expected no reference to another file, found {pid!r}", path=self._path)
