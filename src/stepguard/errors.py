"""Every error that Stepguard raises itself.

::

    StepguardError
    ├── CheckpointError                a checkpoint could not be written, read or used
    │   ├── CheckpointCorruptError     its bytes are not those that were committed
    │   ├── CheckpointMismatchError    its bytes are good, but it does not fit the model
    │   ├── NoGoodCheckpointError      checkpoints exist, and every one of them is damaged
    │   └── SaveFailedError            saving failed for longer than the run may be unprotected
    ├── LogdirInUseError               another live process is the chief of this logdir
    ├── ModelNotReadyError             the model was not fully initialised (also a RuntimeError)
    ├── NoBoundaryError                no step ended in time, so the training state could not be read
    ├── NonFiniteError                 the NaN guard has stopped the run
    └── PeerLeftError                  another process has left a training run that needs every process

    StopRequested                      a SystemExit: ends the loop at the step boundary after SIGTERM

Errors carry fields, so that a program never has to match their text.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepguard.words import printable


class StepguardError(Exception):
    """Base of all errors that Stepguard raises itself. What a message quotes is escaped, line by line."""

    def __init__(self, message: str = "", *others: object) -> None:
        super().__init__("\n".join(map(printable, str(message).split("\n"))), *others)


class CheckpointError(StepguardError):
    """A checkpoint could not be written, read or used. ``path`` is the checkpoint, where one is known."""

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class CheckpointCorruptError(CheckpointError):
    """The bytes of a checkpoint are not those that were committed; ``path`` is the file that differs."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A good checkpoint does not fit the model that it is restored into. Nothing was overwritten.

    ``missing`` names the values that the model has and the checkpoint lacks, ``unexpected`` those that the checkpoint
    holds and the model lacks. ``reshaped`` maps a name to the pair (model's shape, checkpoint's shape).
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | None = None,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        reshaped: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(message, path=path)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.reshaped = dict(reshaped or {})


class NoGoodCheckpointError(CheckpointError):
    """Checkpoints exist, and none is good. Starting over would lose the run, so the user has to ask for it."""


class SaveFailedError(CheckpointError):
    """Saving failed, retries included, for longer than the run may go unprotected. ``__cause__`` is the last error."""


class LogdirInUseError(StepguardError):
    """Another live process is the chief of this logdir: ``host``, ``pid`` and ``since`` (Unix time) name it."""

    def __init__(
        self, message: str, *, logdir: Path, host: str | None = None, pid: int | None = None, since: float | None = None
    ) -> None:
        super().__init__(message)
        self.logdir = logdir
        self.host = host
        self.pid = pid
        self.since = since


class ModelNotReadyError(StepguardError, RuntimeError):
    """The model was restored or initialised, and something in it still has no value."""


class NonFiniteError(StepguardError):
    """The NaN guard has stopped the run. ``names`` lists the numbers or the parts of the state that were not finite,
    and ``step`` is the step at which the guard saw them.
    """

    def __init__(self, message: str, *, step: int | None, names: Sequence[str]) -> None:
        super().__init__(message)
        self.step = step
        self.names = tuple(names)


class NoBoundaryError(StepguardError):
    """No step boundary came in time, so the training state could not be read without mixing two steps."""


class PeerLeftError(StepguardError):
    """The process ``rank`` has left a training run that needs every process, so this process cannot go on."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class StopRequested(SystemExit):
    """Raised by the next step after SIGTERM, so that the run stops at a step boundary. ``managed_session`` catches it.

    It is a SystemExit, so that ``except Exception`` does not catch it and a thread that it ends prints no traceback.
    """


def add_note(error: BaseException, note: str) -> None:
    """Call ``error.add_note(note)``. On Python 3.10 the error keeps the note too, but tracebacks do not print it."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.__dict__.setdefault("__notes__", []).append(note)


def described(error: BaseException) -> str:
    """The type and the message of ``error``; only the type if its ``__str__`` raises."""
    kind = type(error).__name__
    try:
        return f"{kind}: {error}"
    except Exception as raised:  # noqa: BLE001 - __str__ is the program's code: a description of an error must not fail
        return f"{kind} (its __str__ raises {type(raised).__name__})"
