"""Processes that are forked from one which has imported a framework: a start takes no seconds.

``multiprocessing`` has one fork server in a process, which imports what the first to use it says. A test run has all
frameworks, and each has a server of its own here; else the processes of one would be forked from that of another, and
import theirs anew.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

_context = multiprocessing.get_context("forkserver")


class Forks:
    """Starts processes, all from one server, which is started with the first of them and ends with this process.

    ``preloaded`` are modules that the server imports; ``environment`` is what its environment has too.
    """

    def __init__(self, preloaded: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._server = forkserver.ForkServer()
        self._server.set_forkserver_preload([*preloaded, "frozen_heap"])
        given = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **(environment or {})}
        paths = [given["PYTHONPATH"], str(Path(__file__).resolve().parent)]
        self._environment = {**given, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def start(self, target: Callable[..., object], *arguments: Any, daemon: bool | None = None) -> BaseProcess:
        with mock.patch.dict(os.environ, self._environment):
            self._server.ensure_running()
        process = _context.Process(target=target, args=arguments, daemon=daemon)
        with mock.patch.object(forkserver, "connect_to_new_process", self._server.connect_to_new_process):
            process.start()
        return process


def run_program(output: str, argv: Sequence[str], is_strict: bool = False) -> None:
    """In a new process: run the file ``argv[0]`` as Python runs it, with what it prints in the file ``output``.

    With ``is_strict`` as ``python -W error`` does.
    """
    if is_strict:
        warnings.simplefilter("error")
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = list(argv)
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")
    # A process of multiprocessing ends without them.
    atexit._run_exitfuncs()
