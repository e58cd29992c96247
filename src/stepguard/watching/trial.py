"""A trial: a run that `stepguard prove` has started, in a scratch logdir, up to a step that it names.

The program's side of it. The environment variable ``STEPGUARD_TRIAL`` is the path of a file that :func:`write` has
written; a program in between, such as torchrun or a script, passes the variable on without knowing it. Every front door
passes its logdir and its options through :func:`applied`. The program itself is unchanged: its Supervisor writes to the
scratch logdir, traces its batches, saves more often, and asks for a stop at the step of the trial.

The Supervisor touches nothing in the program's own logdir. A trial whose file cannot be read is an error, because the
run would otherwise go on in the real logdir. The program itself may read its own logdir, which is noted; if Python code
of it would change a file there, the call raises, because the result of 200 steps would replace that of the real run.
:mod:`stepguard.watching.logdir_guard` says what is not seen.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stepguard.disk import files
from stepguard.options import Options
from stepguard.watching.logdir_guard import LogdirGuard

VARIABLE = "STEPGUARD_TRIAL"
REASON = "trial"
"""The reason of the stop at the last step of a trial."""

_NOTES = "notes"
_SUFFIX = ".json"
_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Trial:
    """What the program is to do.

    Args:
        place: the directory of this run; the logdir is in it, and what the processes note.
        stop_at: the step after which the run stops; ``None`` lets the program end by itself.
        save_every: steps between checkpoints, in addition to those that the program asks for; ``None`` adds none.
        is_deterministic: whether the frameworks are told to use deterministic algorithms only.
    """

    place: str
    stop_at: int | None = None
    save_every: int | None = None
    is_deterministic: bool = False

    @property
    def logdir(self) -> Path:
        """The logdir of the first Supervisor; see :func:`logdir_of`."""
        return logdir_of(Path(self.place), 0)


@dataclass(frozen=True, slots=True)
class Note:
    """What one process has noted of a Supervisor, or of the program.

    Args:
        kind: "supervisor", "read" or "write"; the last two are of files in the program's own logdir.
        path: the logdir that the program gave, absolute; ``None`` if it gave none. Or the file.
        saves: whether the Supervisor saves.
    """

    kind: str
    path: str | None
    pid: int
    saves: bool = False


def logdir_of(place: Path, number: int) -> Path:
    """The scratch logdir in place of the program's own: one for each that it gives, in the order of its Supervisors.

    The name of the program's logdir is not part of it: many programs take a new one at each start, with the time in it.
    """
    return place / f"logdir-{number}"


def write(path: Path, trial: Trial) -> None:
    """Write the file that :data:`VARIABLE` names."""
    files.make_dirs(Path(trial.place) / _NOTES)
    files.write_volatile(path, json.dumps(asdict(trial)).encode())


def current() -> Trial | None:
    """The trial that this process is part of, or ``None``.

    Raises:
        RuntimeError: there is one, and its file cannot be read.
    """
    path = os.environ.get(VARIABLE)
    return _read(path) if path else None


@functools.lru_cache(maxsize=1)
def _read(path: str) -> Trial:
    try:
        return Trial(**json.loads(files.read_bytes(Path(path))))
    except (OSError, ValueError, TypeError) as error:
        raise RuntimeError(
            f"{VARIABLE}={path}: expected the trial of `stepguard prove`, which has started this program, and it "
            f"cannot be read ({error}). Without it the run would go on in the program's own logdir; unset the variable "
            f"to run the program by itself"
        ) from error


def is_deterministic() -> bool:
    """Whether the frameworks are to use deterministic algorithms only. A front door sets them; it knows how."""
    trial = current()
    return trial is not None and trial.is_deterministic


def applied(logdir: Any, options: Options) -> tuple[Any, Options]:
    """The logdir and the options to use in place of those that the program gave: the same ones if this is no trial.

    Raises:
        RuntimeError: see :func:`current`.
    """
    trial = current()
    if trial is None:
        return logdir, options
    given = None if not logdir else _absolute(os.fspath(logdir))
    _note(trial, Note("supervisor", given, os.getpid(), saves=options.saving.is_on))
    if given is None:
        return logdir, options
    number = _guarded(trial).number(given)
    saving = options.saving
    if saving.is_on:
        steps = [one for one in (saving.save_model_steps, trial.save_every) if one is not None]
        # What the program does with its checkpoints elsewhere, it is to do with real ones only.
        saving = replace(saving, save_model_steps=min(steps, default=None), save_at_end=True, on_commit=None)
    return os.fspath(logdir_of(Path(trial.place), number)), replace(
        options,
        saving=saving,
        watching=_traced(options),
        # The scratch logdir is empty at first.
        restoring=replace(options.restoring, step=None),
        # What a trial saves is no part of the run, and must not reach its mirror.
        mirror=None,
    )


def _traced(options: Options) -> Any:
    # Metrics on a fixed port would meet those of the real run.
    return replace(options.watching, trace="batches", progress=False, metrics_port=None)


def _absolute(logdir: str) -> str:
    # An address such as gs://bucket/run stays what it is.
    return logdir if "://" in logdir else os.path.abspath(logdir)


def notes(place: Path) -> list[Note]:
    """What the processes of a trial have noted, in the order of its time."""
    found = []
    for path in sorted((place / _NOTES).glob(f"*{_SUFFIX}"), key=lambda one: one.stat().st_mtime_ns):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Note(**json.loads(files.read_bytes(path))))
    return found


def _note(trial: Trial, note: Note) -> None:
    directory = Path(trial.place) / _NOTES
    with contextlib.suppress(OSError):
        name = f"{os.getpid()}-{next(_NUMBERS):04d}{_SUFFIX}"
        files.write_volatile(directory / name, json.dumps(asdict(note)).encode())


@functools.lru_cache(maxsize=1)
def _guarded(trial: Trial) -> LogdirGuard:
    return LogdirGuard(lambda kind, path: _note(trial, Note(kind, path, os.getpid())))
