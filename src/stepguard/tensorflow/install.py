"""Replaces TensorFlow's Supervisor by ours, for programs that are to run unchanged."""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf
from tensorflow.python.training import supervisor as tensorflow_supervisor

from stepguard.tensorflow.supervisor import Supervisor

_TENSORFLOW_SUPERVISOR = tensorflow_supervisor.Supervisor


def install() -> None:
    """Replace TensorFlow's Supervisor by ours wherever the process can reach it: under every alias of the API, in its
    own module, and in modules that imported it by name. Modules imported later get ours. A second call does nothing.

    Call it before the program builds its Supervisor. Existing subclasses of TensorFlow's Supervisor do not change.
    """
    tensorflow_supervisor.Supervisor = Supervisor
    tf.compat.v1.train.Supervisor = Supervisor
    # Iterates over a copy: reading an attribute of a lazy module may import other modules.
    for module in list(sys.modules.values()):
        for name, value in list(_attributes(module)):
            if value is _TENSORFLOW_SUPERVISOR and not (name.startswith("_") and module.__name__ == __name__):
                setattr(module, name, Supervisor)


def _attributes(module: Any) -> Any:
    # Reads the dictionary itself: getattr on a lazy module would load the module.
    return getattr(module, "__dict__", {}).items()
