"""Reads pickles without running code from them.

`load` reads a file of ``torch.save``. `loads` reads the pickles of ``torch.distributed.checkpoint``, whose
``.metadata`` is a plain pickle; such a pickle can name any function of any module and have it called. Here a pickle may
name only the records of that package and the types in them. It may fill only records that it has made itself, because a
pickle can also set attributes of a class or of a member of an enumeration, and so change them for the whole program.
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
    # Size is a class; _get_layout only finds a layout (torch.strided) by its name.
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
}


# PyTorch's error, which advises to load the file unsafely, names the refused global in this form.
_REFUSED = re.compile(r"GLOBAL (\S+)")


def load(path: Path, *, mapped: bool = False) -> Any:
    """Load the file ``path`` of ``torch.save`` into host memory.

    With ``mapped`` the tensors stay in the file until they are used.

    Raises:
        CheckpointError: the content could be restored only by running code from the file.
        Exception: any error of PyTorch's for a file that is damaged or that it has not written.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # PyTorch refuses a TorchScript archive by a RuntimeError, which only the text tells from other errors.
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        refusal = refused(path, error)
    # `from error` would also show PyTorch's advice to load the file unsafely.
    raise refusal from None


def refused(path: Path | None, error: Exception) -> CheckpointError:
    """The error for a file in which PyTorch has refused something that could run code."""
    name = _REFUSED.search(str(error))
    found = f"a reference to {name.group(1)}" if name else "another pickle"
    return CheckpointError(
        f"{path}: expected tensors and plain values, which can be read without running code from it, found {found}, "
        f"which could run code: nothing of it was used. Stepguard writes no such file; unless you know who did, remove "
        f"it",
        path=path,
    )


def loads(content: bytes, path: Path | None = None) -> Any:
    """Unpickle ``content``. ``path`` is the file that it comes from, for the error.

    Raises:
        CheckpointError: ``content`` names something other than the records of ``torch.distributed.checkpoint``.
        CheckpointCorruptError: ``content`` is no pickle.
    """
    try:
        return _RecordUnpickler(content, path).load()
    except CheckpointError:
        raise
    # The documentation gives no complete list of the errors that a damaged pickle raises.
    except Exception as error:
        raise CheckpointCorruptError(
            f"{path}: expected the records of torch.distributed.checkpoint, found {len(content)} bytes that are none "
            f"({type(error).__name__}: {error})",
            path=path,
        ) from error


# The pure Python unpickler, because the one in C calls no method before it fills an object.
class _RecordUnpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes, path: Path | None) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path
        # The types of which every object was made by this pickle.
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
        """Set the state of an object. On the stack, the object is below that state."""
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
