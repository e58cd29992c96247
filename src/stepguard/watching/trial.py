"""A trial: a run that `stepguard prove` has started, in a scratch logdir, up to a step that it names.

The program's side of it. The environment variable ``STEPGUARD_TRIAL`` is the path of a file that :func:`write` has
written; a program in between, such as torchrun or a script, passes the variable on without knowing it. Every front door
passes its logdir and its options through :func:`applied`. The program itself is unchanged: its Supervisor writes to the
scratch logdir, traces its batches, saves more often, and asks for a stop at the step of the trial.

Nothing of the program's own logdir is touched. A trial whose file cannot be read is an error, because the run would
otherwise go on in the real logdir. The program itself may read its own logdir, which is noted; if it opens a file there
to write, the call raises, because the result of 200 steps would replace that of the real run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stepguard.disk import files
from stepguard.options import Options

VARIABLE = "STEPGUARD_TRIAL"
REASON = "trial"
"""The reason of the stop at the last step of a trial."""

_NOTES = "notes"
_SUFFIX = ".json"
# What the audit events have as their first argument, a path, and change there.
_WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
_READS = ("os.listdir", "os.scandir")


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
        saving = replace(saving, save_model_steps=min(steps, default=None), save_at_end=True)
    # What a trial saves is no part of the run, and must not reach its mirror.
    options = replace(options, saving=saving, watching=_traced(options), mirror=None)
    return os.fspath(logdir_of(Path(trial.place), number)), options


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
        number = len(os.listdir(directory))
        files.write_volatile(directory / f"{number:04d}-{os.getpid()}{_SUFFIX}", json.dumps(asdict(note)).encode())


# --- the program's own logdir ---


class _Guard:
    """Knows the logdirs that this process was given, and looks at what the program itself opens there."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._given: list[str] = []
        self._noted: set[tuple[str, str]] = set()
        self._is_noting = False
        sys.addaudithook(self._hear)

    def number(self, given: str) -> int:
        """The number of a logdir, from 0."""
        if given not in self._given:
            self._given.append(given)
        return self._given.index(given)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            is_write = bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else any(one in mode for one in "wax+")
        elif event in _WRITES:
            path, is_write = arguments[0], True
        elif event in _READS:
            path, is_write = arguments[0], False
        else:
            return
        if self._is_noting or not isinstance(path, (str, bytes, os.PathLike)) or not self._is_inside(os.fsdecode(path)):
            return
        self._tell("write" if is_write else "read", os.path.abspath(os.fsdecode(path)))

    def _is_inside(self, path: str) -> bool:
        path = os.path.abspath(path)
        return any(path == one or path.startswith(one + os.sep) for one in self._given)

    def _tell(self, kind: str, path: str) -> None:
        if (kind, path) not in self._noted:
            self._noted.add((kind, path))
            with self._noting():
                _note(self._trial, Note(kind, path, os.getpid()))
        # The directory itself may be made: many programs do that before they make their Supervisor.
        if kind == "write" and path not in self._given:
            raise PermissionError(
                f"{path}: this is a trial of `stepguard prove`, and the program itself writes into its own logdir, "
                f"which the trial must not change; give the program another logdir for the proof"
            )

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        self._is_noting = True
        try:
            yield
        finally:
            self._is_noting = False


@functools.lru_cache(maxsize=1)
def _guarded(trial: Trial) -> _Guard:
    return _Guard(trial)
