"""Processes that are forked from one which has imported a framework: a start takes no seconds.

``multiprocessing`` has one fork server in a process, which imports what the first to use it says. A test run has all
frameworks, and each has a server of its own here; else the processes of one would be forked from that of another, and
import theirs anew.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

_context = multiprocessing.get_context("forkserver")


class Forks:
    """Starts processes, all from one server, which is started with the first of them and ends with this process.

    ``preloaded`` are modules that the server imports; ``environment`` is what its environment has too.
    """

    def __init__(self, preloaded: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._server = forkserver.ForkServer()
        self._server.set_forkserver_preload(list(preloaded))
        self._environment = dict(environment or {})

    def start(self, target: Callable[..., object], *arguments: Any, daemon: bool | None = None) -> BaseProcess:
        with mock.patch.dict(os.environ, self._environment):
            self._server.ensure_running()
        process = _context.Process(target=target, args=arguments, daemon=daemon)
        with mock.patch.object(forkserver, "connect_to_new_process", self._server.connect_to_new_process):
            process.start()
        return process
