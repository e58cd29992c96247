"""Stepguard supervises training programs: it restores or initialises, saves, stops cleanly, and resumes.

The supervisors live with their frameworks: ``from stepguard.tensorflow import Supervisor``. This module holds what
needs no framework, and importing it loads none.
"""

from __future__ import annotations

from stepguard.coordinator import Coordinator
from stepguard.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    LogdirInUseError,
    ModelNotReadyError,
    NoBoundaryError,
    NoGoodCheckpointError,
    SaveFailedError,
    StepguardError,
)
from stepguard.looper import LooperThread
from stepguard.store import CheckpointStore

__version__ = "0.1.0"

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointStore",
    "Coordinator",
    "LogdirInUseError",
    "LooperThread",
    "ModelNotReadyError",
    "NoBoundaryError",
    "NoGoodCheckpointError",
    "SaveFailedError",
    "StepguardError",
    "__version__",
]
