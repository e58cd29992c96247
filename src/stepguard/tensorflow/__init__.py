"""Stepguard for TensorFlow graph programs: a drop-in for ``tf.compat.v1.train.Supervisor``."""

from __future__ import annotations

from stepguard import frameworks

frameworks.require("tensorflow")

from stepguard.tensorflow.cluster.retry import is_lost_peer, retry_on_lost_peer
from stepguard.tensorflow.cluster.tasks import ModelWaitTimeoutError
from stepguard.tensorflow.coordinator import Coordinator
from stepguard.tensorflow.install import install
from stepguard.tensorflow.session_manager import SessionManager
from stepguard.tensorflow.supervisor import Supervisor

__all__ = [
    "Coordinator",
    "ModelWaitTimeoutError",
    "SessionManager",
    "Supervisor",
    "install",
    "is_lost_peer",
    "retry_on_lost_peer",
]
