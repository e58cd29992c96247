"""The scratch directory of a proof: one place for each run, which the trial's file and the logdir are in."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from stepguard.watching import trial
from stepguard.watching.trial import Note, Trial


@dataclass(frozen=True, slots=True)
class Place:
    """The directory of one run, which may be started many times."""

    root: Path
    trial: Trial

    @property
    def logdir(self) -> Path:
        """The logdir of the run."""
        return self.trial.logdir

    @property
    def environment(self) -> dict[str, str]:
        """The variable that makes a process part of this run."""
        return {trial.VARIABLE: os.fspath(self.root / "trial.json")}

    def notes(self) -> list[Note]:
        """What the processes of this run have noted so far."""
        return trial.notes(self.root)

    def size(self) -> int:
        """The bytes of all files of the run."""
        found = [os.path.join(folder, name) for folder, _, names in os.walk(self.root) for name in names]
        return sum(os.lstat(one).st_size for one in found if os.path.lexists(one))

    def remove(self) -> None:
        """Remove the run."""
        shutil.rmtree(self.root, ignore_errors=True)


class Scratch:
    """A directory of its own below ``parent``, by default the system's temporary directory."""

    def __init__(self, parent: Path | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="stepguard-prove-", dir=parent))

    def place(
        self, name: str, *, stop_at: int, save_every: int, is_deterministic: bool = False, copy: Path | None = None
    ) -> Place:
        """A new place for a run, which begins with the checkpoints of the logdir ``copy``."""
        root = self.root / name
        made = Trial(os.fspath(root), stop_at=stop_at, save_every=save_every, is_deterministic=is_deterministic)
        trial.write(root / "trial.json", made)
        if copy is not None:
            shutil.copytree(copy, made.logdir)
        return Place(root, made)

    def free_bytes(self) -> int:
        """The free space of its file system."""
        return shutil.disk_usage(self.root).free

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)
