"""The files of a checkpoint, such as ``NAME/model.pt``. PyTorch reads each of them without Stepguard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stepguard.disk.new_file import NewFile
from stepguard.store import manifest
from stepguard.torch.checkpoint import frozen, unpickling

ENGINE = "torch"
"""The name of this engine in the manifests of its checkpoints."""

SUFFIX = ".pt"
PROCESS = "process-"
"""The prefix, before the rank, of the file with the step, the random states and the data positions of one process."""

APART = "apart"
"""The key, in the file of process 0, of the places that the frozen parameters of each part have among its names."""

# A block of this size stays in the cache of a core from its digest to its write.
_BLOCK_BYTES = 1 << 20


def is_process(name: str) -> bool:
    """Whether ``name``, without suffix, is the name of a process file and not of a part of the program's state."""
    return name.startswith(PROCESS) and name[len(PROCESS) :].isdigit()


def process_file(rank: int) -> str:
    """The name of the file of the process of ``rank``."""
    return f"{PROCESS}{rank}{SUFFIX}"


def named_files(path: Path) -> list[Path]:
    """The files ``*.pt`` of the checkpoint at ``path``, sorted; those that its manifest names, if it has one.

    Whatever else lies in the directory was never committed, nor compared with a digest.

    Raises:
        CheckpointCorruptError: the manifest is damaged.
        OSError: the directory or the manifest cannot be read.
    """
    named = manifest.named_files(path)
    if named is None:
        return sorted(one for one in path.glob(f"*{SUFFIX}") if one.is_file())
    return sorted(one for one in named if one.parent == path and one.suffix == SUFFIX)


def frozen_file(part: str) -> str:
    """The name of the file of the frozen parameters of a part; see :mod:`stepguard.torch.checkpoint.frozen`."""
    return f"{frozen.DIRECTORY}/{part}{SUFFIX}"


def frozen_files(path: Path) -> dict[str, Path]:
    """The files of frozen parameters of the checkpoint at ``path``, by the names of the parts. Raises as above."""
    named = manifest.named_files(path)
    directory = path / frozen.DIRECTORY
    if named is None:
        named = [one for one in directory.glob(f"*{SUFFIX}") if one.is_file()]
    return {one.stem: one for one in sorted(named) if one.parent == directory and one.suffix == SUFFIX}


def write_file(path: Path, state: Any) -> tuple[int, str]:
    """Write a file that ``torch.load(path, weights_only=True)`` reads; return its size in bytes and its digest.

    Raises:
        OSError: the disk is full, or fails.
    """
    with NewFile(path) as file:
        append(file, state)
    return file.size, file.digest


def append(file: NewFile, state: Any) -> None:
    """Append one archive of ``torch.save``. Raises OSError: the disk is full, or fails."""
    blocks = _Blocks(file)
    try:
        torch.save(state, blocks)
    except RuntimeError as error:
        if blocks.error is None:
            raise
        # PyTorch tries to finish its archive after the disk error, and raises the failure of that instead.
        raise blocks.error from error


def read_file(path: Path, *, mapped: bool = False) -> Any:
    """Read a file of a checkpoint. No code from the file is run; content that would need it raises CheckpointError.

    With ``mapped`` the tensors stay in the file until they are used, and the caller must not keep them. Use it only for
    a file that was just read to its end, because a disk error under a mapped file ends the process.
    """
    if mapped:
        try:
            return unpickling.load(path, mapped=True)
        except RuntimeError:
            # The file system cannot map files; or the error is another one, which reading raises again.
            pass
    return unpickling.load(path)


class _Blocks:
    """The part of a file that ``torch.save`` needs; it splits each write, because a whole tensor comes at once."""

    def __init__(self, file: NewFile) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, block: Any) -> int:
        view = memoryview(block)
        try:
            for begin in range(0, len(view), _BLOCK_BYTES):
                self._file.write(view[begin : begin + _BLOCK_BYTES])
        except OSError as error:
            self.error = self.error or error
            raise
        return len(view)

    def flush(self) -> None:
        """Do nothing, because there is no buffer."""
