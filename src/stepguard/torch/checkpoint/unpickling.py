"""Reading pickles without running code from them.

`load` reads a file of ``torch.save``. `loads` reads what ``torch.distributed.checkpoint`` pickles: its ``.metadata`` is
a plain pickle, which may name any function of any module and have it called. Here a pickle may name only the records of
that package, and what they hold, and may fill only records that it has made itself: a pickle can also set attributes of
a class, or of a member of an enumeration, which would change them for the whole program.
"""

from __future__ import annotations

import enum
import io
import pickle
import re
from pathlib import Path
from typing import Any, ClassVar

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


# How PyTorch names, in its advice to load the file unsafely, what it has refused.
_REFUSED = re.compile(r"GLOBAL (\S+)")


def load(path: Path, *, mapped: bool = False) -> Any:
    """What ``torch.save`` has written to ``path``, in the memory of this machine.

    With ``mapped`` the tensors stay in the file until they are used.

    Raises:
        CheckpointError: only code from the file could restore it.
        Exception: whatever PyTorch raises for a file that it has not written, or that is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # It has no type of its own for a TorchScript archive.
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        refusal = refused(path, error)
    # Not `from error`: that would show PyTorch's advice below ours.
    raise refusal from None


def refused(path: Path | None, error: Exception) -> CheckpointError:
    """The error for a file of which PyTorch has refused to load something that could run code."""
    name = _REFUSED.search(str(error))
    found = f"a reference to {name.group(1)}" if name else "another pickle"
    return CheckpointError(
        f"{path}: expected tensors and plain values, which can be read without running code from it, found {found}, "
        f"which could run code: nothing of it was used. Stepguard writes no such file; unless you know who did, remove "
        f"it",
        path=path,
    )


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


# The unpickler in Python: the one in C calls no method before it fills an object.
class _RecordUnpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes, path: Path | None) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path
        # Of these every object is the pickle's own.
        self._made: set[type] = set()

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            found = super().find_class(module, name)
            if isinstance(found, type) and not issubclass(found, enum.Enum):
                self._made.add(found)
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"{self._path}: expected only the records of torch.distributed.checkpoint, found a reference to "
            f"{module}.{name}, which could run code: nothing of this file was used. If you know who wrote it, load it "
            f"with torch.distributed.checkpoint itself; else remove the checkpoint",
            path=self._path,
        )

    def load_build(self) -> None:
        """Set the state of an object, which is below that state on the stack."""
        filled = self.stack[-2]  # type: ignore[attr-defined]
        if type(filled) not in self._made:
            raise CheckpointError(
                f"{self._path}: expected records of torch.distributed.checkpoint, found a change of {filled!r}, which "
                f"is PyTorch's own: nothing of this file was used; remove the checkpoint",
                path=self._path,
            )
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError(f"{self._path}: expected no reference to another file, found {pid!r}", path=self._path)
