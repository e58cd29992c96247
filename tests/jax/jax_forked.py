"""Processes forked from one that has imported JAX already, and has not used it: many starts take seconds."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from forks import Forks, run_program

_forks = Forks(
    [
        *("jax", "jax.experimental.multihost_utils", "optax", "grain.python", "stepguard.jax.supervisor"),
        *("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"),
    ]
)


def start(program: str, output: str, arguments: Sequence[str]) -> BaseProcess:
    """Start a process that runs ``program`` of this folder, and prints into the file ``output``."""
    return _forks.start(run_program, output, [str(Path(__file__).with_name(program)), *arguments])
