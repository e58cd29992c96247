"""Stepguard supervises training programs: it restores or initialises, saves, stops cleanly, and resumes.

The supervisors live with their frameworks: ``from stepguard.tensorflow import Supervisor``. This module exports the
names that need no framework. Each is loaded on first use, so importing the package costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stepguard.coordination.coordinator import Coordinator
    from stepguard.coordination.looper import LooperThread
    from stepguard.errors import (
        CheckpointCorruptError,
        CheckpointError,
        CheckpointMismatchError,
        LogdirInUseError,
        ModelNotReadyError,
        NoBoundaryError,
        NoGoodCheckpointError,
        NonFiniteError,
        PeerLeftError,
        SaveFailedError,
        StepguardError,
        StopRequested,
    )
    from stepguard.options import Guarding, Mirror, Restoring, Saving, Stopping, Watching
    from stepguard.store import CheckpointStore

__version__ = "0.1.0"

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointStore",
    "Coordinator",
    "Guarding",
    "LogdirInUseError",
    "LooperThread",
    "Mirror",
    "ModelNotReadyError",
    "NoBoundaryError",
    "NoGoodCheckpointError",
    "NonFiniteError",
    "PeerLeftError",
    "Restoring",
    "SaveFailedError",
    "Saving",
    "StepguardError",
    "StopRequested",
    "Stopping",
    "Watching",
    "__version__",
]

_MODULES = {
    "Coordinator": "coordination.coordinator",
    "LooperThread": "coordination.looper",
    "CheckpointStore": "store",
    **dict.fromkeys(("Guarding", "Mirror", "Restoring", "Saving", "Stopping", "Watching"), "options"),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
