"""Processes forked from one that has imported PyTorch already: many starts take seconds, not minutes."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

WITHOUT_TENSORFLOW = Path(__file__).with_name("without_tensorflow")
# `torch._dynamo` is loaded by the first optimizer that a program makes, and takes longer than PyTorch itself.
LOADED = ["torch", "stepguard.torch", "torch.utils.tensorboard", "torch.optim", "torch._dynamo", "numpy"]

_processes = multiprocessing.get_context("forkserver")


def fork(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Start a process that calls ``target``, which has to call :func:`begin` first."""
    _start_server()
    process = _processes.Process(target=target, args=arguments)
    process.start()
    return process


@functools.cache
def _start_server() -> None:
    _processes.set_forkserver_preload(LOADED)
    paths = os.pathsep.join([str(WITHOUT_TENSORFLOW), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=paths):
        forkserver.ensure_running()


def begin(output: str) -> None:
    """What this new process prints goes to the file ``output``."""
    # And not by the server of this process: loader workers are forked from the process that trains.
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
