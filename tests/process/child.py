"""What the programs of both engines, run as children, have in common."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import breaks
from zygote import report


class ReportingHandler(logging.Handler):
    """Reports the warnings of the library, and each checkpoint that it says to have saved."""

    def __init__(self, saved: Callable[[int | None, str], None]) -> None:
        super().__init__(logging.INFO)
        self._saved = saved

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            report("warning", text=record.getMessage())
        elif record.name == "stepguard.saving.commit" and str(record.msg).startswith("saved step"):
            assert isinstance(record.args, tuple)
            step, path, *_ = record.args
            self._saved(step, path)  # type: ignore[arg-type]


def report_log(saved: Callable[[int | None, str], None] | None = None) -> None:
    """Have the library's log reported. ``saved(step, path)`` is called for each checkpoint, in the writer's thread."""
    log = logging.getLogger("stepguard")
    log.setLevel(logging.INFO)
    log.addHandler(ReportingHandler(saved or (lambda step, path: report("saved", step=step))))


class Break:
    """Breaks the process at call number ``at`` of the services' threads in the first save after ``after_saves``."""

    def __init__(self, how: str | None, at: int | None, after_saves: int) -> None:
        self.left = after_saves
        self.os: breaks.BreakingOs | None = None
        if how is None:
            return
        actions = {"die": breaks.die, "stop": _stop}
        self.os = breaks.BreakingOs(actions[how], at=at, of_services=True)
        breaks.put_under_files(self.os)

    def saved(self, step: int | None, path: str) -> None:
        """A checkpoint is acknowledged."""
        report("saved", step=step)
        self.left -= 1
        if self.os is None:
            return
        if self.left == 0:
            self.os.arm()
        elif self.left == -1:
            # A whole save was counted and nothing happened: there are no more calls than these.
            report("survived", calls=list(self.os.calls))


def _stop(name: str, arguments: tuple[Any, ...]) -> None:
    report("stopping", call=name)
    os.kill(os.getpid(), signal.SIGSTOP)
