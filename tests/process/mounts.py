"""Small filesystems in memory that tests fill up and take away."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MEGABYTE = 1 << 20
DISK_MEGABYTES = 16


class Mount:
    """A small filesystem in memory, at a directory of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_there = True

    def vanish(self) -> None:
        """What was open stays usable, the directory is the empty one below."""
        subprocess.run(["umount", "-l", str(self.path)], check=True, capture_output=True)
        self.is_there = False

    def come_back(self) -> None:
        _mount(self.path)
        self.is_there = True

    def fill(self, leave_megabytes: float = 0) -> Path:
        """Fill what is free now, but for so much. To be called again: a save that was under way gives space back."""
        filler = self.path / "somebody-elses-file"
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while (free := self.free_bytes() - int(leave_megabytes * MEGABYTE)) > 0:
                file.write(b"\0" * min(free, MEGABYTE))
        return filler

    def free_bytes(self) -> int:
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize


def _mount(path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Mount]:
    """A filesystem at the new directory ``path``; where none can be mounted, the test is skipped."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a filesystem")
    path.mkdir()
    _mount(path)
    mount = Mount(path)
    yield mount
    subprocess.run(["umount", "-l", str(path)], check=mount.is_there, capture_output=True)
