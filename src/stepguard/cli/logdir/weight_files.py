"""Files with weights that other tools read: a ``state_dict`` of PyTorch, safetensors, NumPy's npz.

Each is written into a file beside the wanted one, synced, and then gets its name: nobody sees a part of it. A type that
a file has no room for is an error; nothing is cast.
"""

from __future__ import annotations

import importlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepguard.cli import interrupts
from stepguard.cli.exits import NOT_DONE, CommandError
from stepguard.disk import files
from stepguard.disk.new_file import NewFile
from stepguard.store.saved_tensor import SavedWeight
from stepguard.words import printable

if TYPE_CHECKING:
    import numpy as np

# The names of types in a safetensors file, https://github.com/huggingface/safetensors#format.
_SAFETENSORS_TYPES = {
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "bool": "BOOL",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}


def write(out: Path, weights: Sequence[SavedWeight]) -> int:
    """Write ``weights`` to the file ``out``, in the format of its suffix, replacing it; return its size in bytes.

    Raises:
        CommandError: the format has no room for a type, its package is missing, or two weights have one name.
        OSError: the disk is full, or fails.
    """
    _check_names(out, weights)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with NewFile(aside) as file:
            FORMATS[out.suffix](file, weights)
        files.fsync_file(aside)
        files.move(aside, out)
        files.fsync_dir(out.parent)
    except ValueError as error:
        raise CommandError(
            f"{out}: {error}, which a file {out.suffix} has no room for, and nothing is cast: choose another format",
            NOT_DONE,
        ) from error
    finally:
        files.remove_quietly(aside)
    return file.size


def _check_names(out: Path, weights: Sequence[SavedWeight]) -> None:
    names: set[str] = set()
    for one in weights:
        if one.name in names:
            raise CommandError(
                f"{out}: two tensors have the name {printable(one.name)!r}, and a file has room for one of each name: "
                f"rename one of them in the program, or choose another --part",
                NOT_DONE,
            )
        names.add(one.name)


def _write_safetensors(file: NewFile, weights: Sequence[SavedWeight]) -> None:
    # The largest types first, so that each number is at a multiple of its size. One tensor has one name there, so tied
    # ones are written once for each name.
    in_order = sorted(weights, key=lambda one: (-_item_bytes(one), one.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in in_order:
        if one.dtype not in _SAFETENSORS_TYPES or one.name == "__metadata__":
            raise ValueError(f"{one.name} is of the type {one.dtype}")
        offsets = [end, end := end + one.nbytes]
        header[one.name] = {
            "dtype": _SAFETENSORS_TYPES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": offsets,
        }
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little"))
    file.write(content)
    for one in in_order:
        file.write(one.read())


def _item_bytes(one: SavedWeight) -> int:
    count = 1
    for size in one.shape:
        count *= size
    return one.nbytes // count if count else 0


def _write_npz(file: NewFile, weights: Sequence[SavedWeight]) -> None:
    import numpy as np

    dtypes = [_numpys(one) for one in weights]
    with zipfile.ZipFile(_Stream(file), "w", allowZip64=True) as archive:  # type: ignore[call-overload]
        for one, dtype in zip(weights, dtypes, strict=True):
            with archive.open(f"{one.name}.npy", "w", force_zip64=True) as member:
                array = one.read().view(dtype).reshape(one.shape)
                np.lib.format.write_array(member, array, allow_pickle=False)


def _numpys(one: SavedWeight) -> np.dtype[Any]:
    import numpy as np

    # By the name, because a package such as ml_dtypes adds types that NumPy's files do not keep.
    if one.dtype not in {*_SAFETENSORS_TYPES, "complex128"} or one.dtype.startswith(("bfloat", "float8")):
        raise ValueError(f"{one.name} is of the type {one.dtype}")
    return np.dtype(one.dtype)


class _Stream:
    """What zipfile needs of a file that cannot go back."""

    def __init__(self, file: NewFile) -> None:
        self._file = file

    def write(self, block: Any) -> int:
        self._file.write(block)
        return memoryview(block).nbytes

    def flush(self) -> None:
        """Do nothing, because there is no buffer."""


def _write_state_dict(file: NewFile, weights: Sequence[SavedWeight]) -> None:
    try:
        with interrupts.held():
            module = importlib.import_module("stepguard.torch.checkpoint.weights")
    except ImportError as error:
        raise CommandError(
            f"{file.path.parent}: a state_dict of PyTorch cannot be written: {error}; or choose .safetensors or .npz",
            NOT_DONE,
        ) from error
    module.write_state_dict(file, weights)


FORMATS: Mapping[str, Callable[[NewFile, Sequence[SavedWeight]], None]] = {
    ".pt": _write_state_dict,
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
}
"""The formats, by the suffixes of files."""
