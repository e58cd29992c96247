"""What the store answers with: a checkpoint, a damaged one, and the outcome of a search for the newest good one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from stepguard.schema import MOST_DIGITS
from stepguard.store.manifest import Manifest

# Of more digits, or of those of other scripts, it is no number that a step can be.
_WITH_STEP = re.compile(rf"(.+)-([0-9]{{1,{MOST_DIGITS}}})", re.DOTALL)


def split_name(name: str) -> tuple[str, int | None]:
    """Return the basename and the step of a checkpoint's name; the step is None where it has none."""
    match = _WITH_STEP.fullmatch(name)
    return (name, None) if match is None else (match.group(1), int(match.group(2)))


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
    """One checkpoint that was not good: why, and the directory it was moved to (None: it was left where it was).

    ``is_gone``: there is no file of it, so that somebody has removed it.
    """

    checkpoint: Checkpoint
    reason: str
    moved_to: Path | None = None
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A checkpoint without a manifest that its name would make the newest, and why it is not."""

    checkpoint: Checkpoint
    reason: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a search for the newest good checkpoint found. ``checkpoint`` is None if there was none at all.

    Of one without a manifest ``step`` is the step that it holds, if that could be read.
    """

    checkpoint: Checkpoint | None
    damaged: tuple[Damage, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()

    @property
    def steps_lost(self) -> int | None:
        """Steps between the newest damaged checkpoint and the good one; None where steps are not known."""
        newest = max((one.checkpoint.step for one in self.damaged if one.checkpoint.step is not None), default=None)
        if newest is None or self.checkpoint is None or self.checkpoint.step is None:
            return None
        return max(0, newest - self.checkpoint.step)

    def message(self) -> str:
        """Return the one clear warning: what was damaged or passed over, where it is now, what was lost. Empty if the
        newest by its name is good, and is what its name says.
        """
        parts = [_told(one) for one in self.damaged]
        parts += [f"{one.checkpoint.path} is passed over ({one.reason})" for one in self.passed_over]
        good = self.checkpoint
        name_says_so = good is None or good.step in (None, split_name(good.name)[1])
        if not parts and name_says_so:
            return ""
        if good is None:
            end = "no other checkpoint is left, so training starts over"
        else:
            end = f"resuming from {good.path}"
            if not name_says_so:
                end += f", which holds step {good.step}"
            lost = self.steps_lost
            if lost is not None:
                end += f", {lost} step{'' if lost == 1 else 's'} earlier"
        return ": ".join([*(["; ".join(parts)] if parts else []), end])


def _told(damage: Damage) -> str:
    if damage.is_gone:
        return f"{damage.checkpoint.path} is gone ({damage.reason})"
    where = f"moved to {damage.moved_to}" if damage.moved_to is not None else "left where it is"
    return f"{damage.checkpoint.path} is damaged ({damage.reason}; {where})"
