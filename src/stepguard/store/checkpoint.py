"""The objects that the store returns: a checkpoint, a damaged one, and the result of a search for a good one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from stepguard.disk.schema import MOST_DIGITS
from stepguard.store.manifest import Manifest

# More digits, or digits of other scripts, cannot be a step.
_WITH_STEP = re.compile(rf"(.+)-([0-9]{{1,{MOST_DIGITS}}})", re.DOTALL)


def split_name(name: str) -> tuple[str, int | None]:
    """Return the basename and the step in a checkpoint's name; the step is None if it has none."""
    match = _WITH_STEP.fullmatch(name)
    return (name, None) if match is None else (match.group(1), int(match.group(2)))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in a directory. Two are equal if they have the same directory, name and step.

    ``time`` is the Unix time of the commit; for a checkpoint that was only listed, it is the last write of its manifest
    or entry file. ``manifest`` is None if there is none, or if the checkpoint was listed and not yet verified;
    ``is_committed`` tells the two cases apart.
    """

    root: Path
    name: str
    step: int | None
    time: float = field(compare=False)
    is_committed: bool = field(compare=False)
    manifest: Manifest | None = field(default=None, compare=False)

    @property
    def path(self) -> Path:
        """The path that a framework restores: TensorFlow's prefix, or PyTorch's directory."""
        return self.root / self.name


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged checkpoint: the reason, and the directory to which it was moved (None: it was not moved).

    ``is_gone`` says that its files are not there, because somebody has removed them.
    """

    checkpoint: Checkpoint
    reason: str
    moved_to: Path | None = None
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A checkpoint without a manifest that would be the newest by its name, and the reason why it is not used."""

    checkpoint: Checkpoint
    reason: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """The result of a search for the newest good checkpoint. ``checkpoint`` is None if there are no checkpoints.

    For a checkpoint without a manifest, ``step`` is the step that it contains, if that could be read. ``rolled_back``
    says that the run was put back to the checkpoint on purpose, and begins there for the first time.
    """

    checkpoint: Checkpoint | None
    damaged: tuple[Damage, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    rolled_back: bool = False

    @property
    def steps_lost(self) -> int | None:
        """The number of steps between the newest damaged checkpoint and the good one; None if steps are not known."""
        newest = max((one.checkpoint.step for one in self.damaged if one.checkpoint.step is not None), default=None)
        if newest is None or self.checkpoint is None or self.checkpoint.step is None:
            return None
        return max(0, newest - self.checkpoint.step)

    def message(self) -> str:
        """Return the one warning: which checkpoints were damaged or passed over, where they are now, what was lost.

        It is empty if the newest checkpoint by its name is good and contains the step in its name.
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
