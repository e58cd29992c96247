"""What the store answers with: a checkpoint, a damaged one, and the outcome of a search for the newest good one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stepguard.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in a directory. Two are equal when they have the same place, name and step.

    ``time`` is when it was committed (Unix time); for one that was only listed, when its manifest or entry file was
    last written. ``manifest`` is None where there is none, and for one that was listed and not yet verified:
    ``is_committed`` tells the two apart.
    """

    root: Path
    name: str
    step: int | None
    time: float = field(compare=False)
    is_committed: bool = field(compare=False)
    manifest: Manifest | None = field(default=None, compare=False)

    @property
    def path(self) -> Path:
        """What a framework is given to restore: the TensorFlow prefix, or the PyTorch directory."""
        return self.root / self.name


@dataclass(frozen=True, slots=True)
class Damage:
    """One checkpoint that was not good: why, and the directory it was moved to (None: it was left where it was)."""

    checkpoint: Checkpoint
    reason: str
    moved_to: Path | None = None


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a search for the newest good checkpoint found. ``checkpoint`` is None if there was none at all."""

    checkpoint: Checkpoint | None
    damaged: tuple[Damage, ...] = ()

    @property
    def steps_lost(self) -> int | None:
        """Steps between the newest damaged checkpoint and the good one; None where steps are not known."""
        newest = max((one.checkpoint.step for one in self.damaged if one.checkpoint.step is not None), default=None)
        if newest is None or self.checkpoint is None or self.checkpoint.step is None:
            return None
        return max(0, newest - self.checkpoint.step)

    def message(self) -> str:
        """Return the one clear warning: what was damaged, where it is now, what was lost. Empty if nothing was."""
        if not self.damaged:
            return ""
        parts = []
        for one in self.damaged:
            where = f"moved to {one.moved_to}" if one.moved_to is not None else "left where it is"
            parts.append(f"{one.checkpoint.path} is damaged ({one.reason}; {where})")
        if self.checkpoint is None:
            end = "no other checkpoint is left, so training starts over"
        else:
            end = f"resuming from {self.checkpoint.path}"
            lost = self.steps_lost
            if lost is not None:
                end += f", {lost} step{'' if lost == 1 else 's'} earlier"
        return "; ".join(parts) + ": " + end
