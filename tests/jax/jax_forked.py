"""Processes forked from one that has imported JAX already, and has not used it: many starts take seconds."""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from forks import Forks

_forks = Forks(
    [
        *("jax", "jax.experimental.multihost_utils", "optax", "grain.python", "stepguard.jax.supervisor"),
        *("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"),
    ]
)


def start(program: str, output: str, arguments: Sequence[str]) -> BaseProcess:
    """Start a process that runs ``program`` of this folder, and prints into the file ``output``."""
    return _forks.start(_run, program, output, arguments)


def _run(program: str, output: str, arguments: Sequence[str]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [program, *arguments]
    runpy.run_path(str(Path(__file__).with_name(program)), run_name="__main__")
    # A forked process ends without them, and the processes of JAX wait for each other there.
    atexit._run_exitfuncs()
