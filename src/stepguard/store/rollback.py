"""Rollback: a run goes on at an earlier checkpoint, and the newer ones are put aside, not removed.

The order, so that a kill at any point leaves either the run as it was or one that the next start finishes: first
``rollback.json`` says which checkpoint is gone back to, and which are put aside; then these are moved, file by file, to
``aside/NUMBER/``; then the state file names the old one; then ``rollback.json`` says that it is done. A start that
finds it unfinished does the rest before it looks for a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stepguard.disk import files, schema
from stepguard.store import statefile
from stepguard.store.checkpoint import Checkpoint
from stepguard.store.layout import Layout
from stepguard.words import logger

_log = logger(__name__)

FILE_NAME = "rollback.json"
ASIDE = "aside"

_PENDING, _DONE, _TAKEN = "pending", "done", "taken"
MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Rollback:
    """A rollback to the checkpoint ``to``, as it was ``asked`` for, by the program (``by_program``) or a command.

    ``names`` are the newer checkpoints, which are put into ``aside/place``. ``state`` is "pending", "done", or "taken"
    once a run has begun there. ``time`` is the Unix time.
    """

    to: str
    step: int | None
    asked: str
    by_program: bool
    names: list[str]
    place: str
    state: str = _PENDING
    time: float = 0.0

    @property
    def is_pending(self) -> bool:
        """Whether newer checkpoints may not be put aside yet."""
        return self.state == _PENDING

    @property
    def is_new(self) -> bool:
        """Whether no run has begun there yet."""
        return self.state == _DONE

    def gives_up(self, step: int | None, time: float) -> bool:
        """Whether it gives up the checkpoint of a step that was committed at ``time`` (Unix), wherever that is."""
        return time < self.time and (-1 if step is None else step) > (-1 if self.step is None else self.step)


def read(root: Path) -> Rollback | None:
    """The last rollback of a logdir; None if there was none, or if its record is damaged."""
    try:
        return parse(files.read_own(root / FILE_NAME, most=MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s: cannot be read, and is passed over: %s", root / FILE_NAME, error)
        return None


def parse(content: bytes) -> Rollback:
    """The rollback that a record tells of. Raises ValueError or TypeError if the record is damaged."""
    kinds = schema.kinds_of(Rollback)
    return Rollback(**schema.checked(schema.parse(content), kinds, required=tuple(kinds)))


def take_over(root: Path, record: Rollback) -> None:
    """Note a rollback that another machine has done. What it has put aside there is not here."""
    _write(root, replace(record, state=_DONE) if record.is_pending else record)


def roll_back(layout: Layout, to: Checkpoint, asked: str, *, by_program: bool) -> Rollback:
    """Put the checkpoints of later steps than ``to`` aside, and return what was done. Only for the chief.

    Raises OSError if the disk fails. What is not done then, is done by the next start.
    """
    newer = [one.name for one in layout.candidates() if _is_later(one, to)]
    record = Rollback(to.name, to.step, asked, by_program, newer, _vacant(layout.root), time=time.time())
    _write(layout.root, record)
    return finish(layout, record)


def finish(layout: Layout, record: Rollback) -> Rollback:
    """Do what is left of a rollback. Only for the chief, while nothing is being written."""
    names = [name for name in record.names if layout.is_name(name) and name != record.to]
    if not layout.is_name(record.to) or not record.place.isdigit():
        return replace(record, state=_TAKEN)
    if names:
        files.make_own_dir(layout.root / ASIDE)
        target = layout.root / ASIDE / record.place
        with contextlib.suppress(FileExistsError):
            files.make_dir(target)
        files.check_own_dir(target)
        for name in names:
            layout.quarantine(name, target)
    _point_to(layout, record.to, set(names))
    done = replace(record, state=_DONE)
    _write(layout.root, done)
    return done


def note_start(root: Path, record: Rollback) -> None:
    """Note that a run has begun where the rollback led to."""
    _write(root, replace(record, state=_TAKEN))


def forget(root: Path) -> None:
    """Forget the last rollback, so that the program may ask for the same one again."""
    files.remove(root / FILE_NAME)


def _is_later(one: Checkpoint, to: Checkpoint) -> bool:
    return one.name != to.name and (-1 if one.step is None else one.step) > (-1 if to.step is None else to.step)


def _point_to(layout: Layout, name: str, aside: set[str]) -> None:
    state = statefile.read(layout.root)
    names = [] if state is None else [one for one in state.names if one not in aside and one != name]
    stated, *listed = layout.stated([name, *names, name])
    is_relative = state is not None and not state.path.is_absolute()
    last_preserved = None if state is None else state.last_preserved
    statefile.write(layout.root.absolute(), stated, listed, last_preserved=last_preserved, relative_paths=is_relative)


def _vacant(root: Path) -> str:
    try:
        taken = [int(one) for one in os.listdir(root / ASIDE) if one.isdigit() and len(one) < 10]
    except OSError:
        taken = []
    return str(max(taken, default=0) + 1)


def _write(root: Path, record: Rollback) -> None:
    files.write_atomic(root / FILE_NAME, (json.dumps(asdict(record), indent=1) + "\n").encode())
