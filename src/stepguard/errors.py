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
    └── PeerLeftError                  another process has left a training that takes all of them

    StopRequested                      a SystemExit: leaves a loop at the step boundary after SIGTERM

Errors carry fields, so that a program never has to match their text.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class StepguardError(Exception):
    """Base of all errors that Stepguard raises itself."""


class CheckpointError(StepguardError):
    """A checkpoint could not be written, read or used. ``path`` is the checkpoint, where one is known."""

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class CheckpointCorruptError(CheckpointError):
    """The bytes of a checkpoint are not those that were committed; ``path`` is the file that differs."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A good checkpoint does not fit the model that it is restored into. Nothing was overwritten.

    ``missing`` names what the model has and the checkpoint lacks, ``unexpected`` the reverse, and ``reshaped`` maps
    a name to the pair (what the model has, what the checkpoint holds).
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
    """Checkpoints exist, and none is good: starting over would lose the run, so it has to be asked for."""


class SaveFailedError(CheckpointError):
    """Saving failed, with retries, for longer than the run may go unprotected. The cause is attached."""


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
    """The NaN guard has stopped the run: ``names`` says what was not finite (numbers, or parts of the state), and
    ``step`` when.
    """

    def __init__(self, message: str, *, step: int | None, names: Sequence[str]) -> None:
        super().__init__(message)
        self.step = step
        self.names = tuple(names)


class NoBoundaryError(StepguardError):
    """No step boundary came in time, so the training state could not be read without mixing two steps."""


class PeerLeftError(StepguardError):
    """Another process, ``rank``, has left a training that takes all of them, while this one was to go on."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class StopRequested(SystemExit):
    """Raised by the next step after SIGTERM, so that the run stops at a step boundary. ``managed_session`` ends it.

    It is a SystemExit so that neither ``except Exception`` holds it up nor a thread that it ends prints it.
    """


def add_note(error: BaseException, note: str) -> None:
    """``error.add_note(note)``, also on Python 3.10, where tracebacks do not print notes but the error keeps them."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.__dict__.setdefault("__notes__", []).append(note)


def described(error: BaseException) -> str:
    """The type and the message of an error of any make; of one that cannot tell its message, the type."""
    kind = type(error).__name__
    try:
        return f"{kind}: {error}"
    except Exception as raised:  # noqa: BLE001 - the code of a program: what is told of an error is no place to fail
        return f"{kind} (its __str__ raises {type(raised).__name__})"
