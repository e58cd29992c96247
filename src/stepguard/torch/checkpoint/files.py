"""The files of a checkpoint: ``NAME/model.pt`` and its kin, each of which PyTorch reads without Stepguard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stepguard import files
from stepguard.torch.checkpoint import unpickling

ENGINE = "torch"
"""What the manifests of this engine's checkpoints name."""

SUFFIX = ".pt"
PROCESS = "process-"
"""Before the rank: the file with the step, and the random states and positions in the data of one process."""

# One block stays in the cache of a core from its digest to its write.
_BLOCK_BYTES = 1 << 20


def is_process(name: str) -> bool:
    """Whether a file of that name, without its suffix, is ours and not one of the program's state."""
    return name.startswith(PROCESS) and name[len(PROCESS) :].isdigit()


def process_file(rank: int) -> str:
    """The name of the file of the process of ``rank``."""
    return f"{PROCESS}{rank}{SUFFIX}"


def write_file(path: Path, state: Any) -> tuple[int, str]:
    """Write a file that ``torch.load(path, weights_only=True)`` reads; its size in bytes, and its digest.

    Raises:
        OSError: the disk is full, or fails.
    """
    with files.NewFile(path) as file:
        append(file, state)
    return file.size, file.digest


def append(file: files.NewFile, state: Any) -> None:
    """Append one archive of ``torch.save``. Raises OSError: the disk is full, or fails."""
    blocks = _Blocks(file)
    try:
        torch.save(state, blocks)
    except RuntimeError as error:
        if blocks.error is None:
            raise
        # PyTorch ends its archive all the same, and then complains about that instead.
        raise blocks.error from error


def read_file(path: Path, *, mapped: bool = False) -> Any:
    """Read it. No code from the file is run, and what only code could restore is a CheckpointError.

    With ``mapped`` the tensors are those of the file, and not in memory until they are used: that is for one that was
    just read to its end, since a disk that fails under it would end the process. Nobody may keep them.
    """
    if mapped:
        try:
            return unpickling.load(path, mapped=True)
        except RuntimeError:
            # A filesystem that maps no files, or another error, which reading then raises again.
            pass
    return unpickling.load(path)


class _Blocks:
    """What ``torch.save`` needs of a file. It writes a whole tensor at once."""

    def __init__(self, file: files.NewFile) -> None:
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
        """Nothing: there is no buffer."""
