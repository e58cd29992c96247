"""The checkpoint with which all runs but the first begin: an early one of the first run, copied while that run goes on.

So they begin with the same state also where the program draws its first weights without a seed, and the copy is what a
power loss at that moment would have left.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from stepguard.cli.logdir.contents import GOOD, ListedCheckpoint, list_contents
from stepguard.watching import ledger, trace


@dataclass(slots=True)
class Beginning:
    """Copies the first checkpoint of ``logdir`` from step ``at_least`` on to the new directory ``target``.

    ``step`` is that of the copy, ``None`` as long as there is none.
    """

    logdir: Path
    target: Path
    at_least: int
    step: int | None = None

    def look(self) -> None:
        """Copy it, if it is there now. The run may remove it meanwhile; then the next one is copied."""
        if self.step is not None:
            return
        try:
            good = [one for one in list_contents(self.logdir).found if one.state == GOOD]
            found = [one for one in good if (one.checkpoint.step or 0) >= self.at_least]
            if found:
                self._copy(min(found, key=lambda one: one.checkpoint.step or 0))
        except OSError:
            shutil.rmtree(self.target, ignore_errors=True)

    def take_kept(self, last_step: int) -> None:
        """After the run, take the oldest of the checkpoints that it has kept, if there was no chance before."""
        self.look()
        if self.step is not None and self.step >= last_step:
            shutil.rmtree(self.target, ignore_errors=True)
            self.step = None

    def _copy(self, one: ListedCheckpoint) -> None:
        manifest = one.checkpoint.manifest
        assert manifest is not None
        for file in manifest.files:
            self._copy_file(file.name)
        for name in (f"{one.checkpoint.name}.manifest.json", ledger.FILE_NAME):
            self._copy_file(name)
        for path in (self.logdir / trace.DIR_NAME).glob(f"*{trace.SUFFIX}"):
            self._copy_file(os.fspath(path.relative_to(self.logdir)))
        self.step = one.checkpoint.step

    def _copy_file(self, name: str) -> None:
        (self.target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.logdir / name, self.target / name)
