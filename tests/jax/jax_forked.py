"""Processes forked from one that has imported JAX already, and has not used it: many starts take seconds."""

from __future__ import annotations

import functools
import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess

_processes = multiprocessing.get_context("forkserver")


def start(output: str, command: list[str]) -> BaseProcess:
    """Start a process that trains, and prints into the file ``output``."""
    _start_server()
    process = _processes.Process(target=_train, args=(output, command))
    process.start()
    return process


@functools.cache
def _start_server() -> None:
    _processes.set_forkserver_preload(["jax", "optax", "grain.python", "stepguard.jax", "stepguard.jax.supervisor"])
    forkserver.ensure_running()


def _train(output: str, command: list[str]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import jax_training

    jax_training.main(command)
