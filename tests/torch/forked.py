"""Processes forked from one that has imported PyTorch already: many starts take seconds, not minutes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forks import Forks

WITHOUT_TENSORFLOW = Path(__file__).with_name("without_tensorflow")
# `torch._dynamo` is loaded by the first optimizer that a program makes, and takes longer than PyTorch itself.
LOADED = ["torch", "stepguard.torch", "torch.utils.tensorboard", "torch.optim", "torch._dynamo", "numpy"]

_paths = os.pathsep.join([str(WITHOUT_TENSORFLOW), *filter(None, [os.environ.get("PYTHONPATH")])])
_forks = Forks(LOADED, {"PYTHONPATH": _paths})


def fork(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Start a process that calls ``target``, which has to call :func:`begin` first."""
    return _forks.start(target, *arguments)


def begin(output: str) -> None:
    """What this new process prints goes to the file ``output``."""
    # And not by the server of this process: loader workers are forked from the process that trains.
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
