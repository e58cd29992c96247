"""The progress line of a run. Nothing is shown without a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import Any

from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.part import Part
from stepguard.words import duration, logger

_log = logger(__name__)


class ProgressLine(Part):
    """A line at the bottom of the terminal of standard error, below the output of the program. One thread."""

    def __init__(self, now: Heartbeat) -> None:
        self._now = now
        self._progress: Any = None
        self._task: Any = None
        self._has_gone = False
        self._led_above: list[tuple[logging.StreamHandler[Any], Any]] = []

    def look(self) -> None:
        """Redraw the line if standard error is a terminal that still exists."""
        if self._has_gone:
            return
        try:
            self._draw()
        except OSError as error:
            # EIO: the window was closed. That must not end the training.
            _log.debug("the terminal has gone away: %s", error)
            self._has_gone = True
            self._give_back()

    def _draw(self) -> None:
        if self._progress is None and not self._open():
            return
        now = self._now
        self._progress.update(
            self._task,
            completed=now.step or 0,
            total=now.total_steps,
            rate=_rate(now.steps_per_sec),
            left=_left(now),
            saved=_saved(now.last_checkpoint),
        )
        self._progress.refresh()

    def leave(self) -> None:
        """Draw the line for the last time, and give the terminal back to the program."""
        if self._progress is None:
            return
        self.look()
        self._give_back()

    def _give_back(self) -> None:
        progress, self._progress = self._progress, None
        if progress is None:
            return
        for handler, stream in self._led_above:
            handler.setStream(stream)
        # stop() restores the standard streams even if the terminal raises an error.
        with contextlib.suppress(OSError):
            progress.stop()

    def _open(self) -> bool:
        stream = sys.stderr
        if stream is None or not stream.isatty():
            return False
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        of = "/{task.total}" if self._now.total_steps is not None else ""
        bar = [BarColumn(bar_width=None)] if self._now.total_steps is not None else []
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}" + of),
            *bar,
            TextColumn("{task.fields[rate]}{task.fields[left]}{task.fields[saved]}"),
            console=Console(file=stream),
            auto_refresh=False,
            # Redirect stdout only if it is a terminal: output to a file or a pipe must stay there.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
            expand=bool(bar),
        )
        self._task = self._progress.add_task("", total=self._now.total_steps, rate="", left="", saved="")
        self._progress.start()
        self._lead_logs_above(stream)
        return True

    def _lead_logs_above(self, terminal: Any) -> None:
        """Redirect log handlers to Rich's sys.stderr: a handler keeps the stream that it was made with."""
        for handler in [*logging.getLogger().handlers, *logging.getLogger("stepguard").handlers]:
            if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                handler.setStream(sys.stderr)
                self._led_above.append((handler, terminal))


def _rate(steps_per_sec: float | None) -> str:
    if not steps_per_sec:
        return "-/s"
    return f"{steps_per_sec:.0f}/s" if steps_per_sec >= 10 else f"{steps_per_sec:.2g}/s"


def _left(now: Heartbeat) -> str:
    if now.total_steps is None or now.step is None or not now.steps_per_sec:
        return ""
    return f", {duration((now.total_steps - now.step) / now.steps_per_sec)} left"


def _saved(checkpoint: dict[str, Any] | None) -> str:
    if checkpoint is None:
        return ", nothing saved"
    return f", saved {checkpoint['step']} {duration(time.time() - checkpoint['time'])} ago"
