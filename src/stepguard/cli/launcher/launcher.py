"""The life of `stepguard run`: start a program, pass signals on, and start it again when it has crashed."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from stepguard.cli.launcher.attempt_outcome import Runs
from stepguard.cli.launcher.processes import Processes, send
from stepguard.cli.launcher.relay import Relay
from stepguard.cli.launcher.restarts import CRASH_LOOP, SAME_FAILURES, Failure, GiveUp, Restart, Restarts
from stepguard.cli.launcher.signal_queue import STOPS, SignalQueue
from stepguard.cli.text import output
from stepguard.watching import heartbeat, launcher_link
from stepguard.watching.history import History
from stepguard.words import duration

CRASH_LOOP_EXIT = 70
"""The exit code for a crash loop: EX_SOFTWARE of sysexits.h."""
USAGE, CANNOT_EXECUTE, NOT_FOUND = 2, 126, 127
"""The exit codes of a program that was called wrongly, cannot be executed, or is not there: as in a shell."""

_LOOK_SECS = 0.5
# Two signals so close are one request: `timeout` and some schedulers send it to a process, and to its group.
_ONE_REQUEST_SECS = 0.5
_RELAY_SECS = 1.0
_SHOWN_LINES = 10


@dataclass(frozen=True, slots=True)
class Ended:
    """How one start of the program ended. ``code`` is negative for a signal."""

    code: int
    pid: int
    secs: float
    has_progressed: bool
    failure: Failure
    lines: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return self.code if self.code >= 0 else 128 - self.code


class Launcher:
    """Starts ``argv`` until it has ended well, was asked to stop, or cannot succeed. The main thread, once.

    Args:
        argv: the program and its arguments.
        logdir: where its run leaves its files; ``None`` waits for the program to announce it.
        restarts: decides after each crash.
        grace_secs: how long the processes that the program has left behind may take to stop.
        say: prints a line for the person who watches.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        logdir: Path | None,
        restarts: Restarts,
        grace_secs: float,
        say: Callable[[str], None],
    ) -> None:
        self._argv = list(argv)
        self._logdir = logdir
        self._restarts = restarts
        self._grace_secs = grace_secs
        self._say = say
        self._processes = Processes()
        self._signals = SignalQueue()
        self._runs: Runs
        self._stop_asked: float | None = None
        self._stopped_by: str | None = None
        self._attempt = 0
        # The ledger's times are rounded.
        self._began = time.time() - 0.001

    def run(self) -> int:
        """The exit code: the program's own last one, 128 + n for signal n, or `CRASH_LOOP_EXIT`."""
        with self._signals, TemporaryDirectory(prefix="stepguard-run-", ignore_cleanup_errors=True) as announcements:
            self._runs = Runs(self._logdir, Path(announcements))
            environment = {**os.environ, launcher_link.LAUNCHER_DIR: announcements}
            while True:
                self._attempt += 1
                ended = self._start({**environment, launcher_link.ATTEMPT: str(self._attempt)})
                if isinstance(ended, int):
                    return ended
                if (exit_code := self._exit_code(ended)) is not None:
                    return exit_code

    def histories(self) -> list[tuple[Path, History]]:
        """What became of the time since `run` began, for each logdir that became known."""
        return self._runs.histories(self._began)

    # --- one start ---

    def _start(self, environment: dict[str, str]) -> Ended | int:
        """One start, from its beginning to the end of the last of its processes; or why there was none."""
        relay = Relay()
        began, clock = time.time(), time.monotonic()
        shares_terminal = _is_in_foreground()
        try:
            pid = self._processes.start(
                self._argv,
                environment=environment,
                stderr=relay.writer,
                has_own_group=not shares_terminal,
                in_child=self._signals.unblock,
            )
        except OSError as error:
            self._say(f"{output.printable(self._argv[0])} could not be started: {error.strerror or error}")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_EXECUTE
        finally:
            relay.program_has_it()
        self._runs.tell(
            "launch",
            began,
            attempt=self._attempt,
            argv=self._argv,
            child_pid=pid,
            process_start=heartbeat.process_start(os.getpid()),
        )
        code = self._wait(pid, relay, shares_terminal=shares_terminal)
        if code != 0:
            self._end_the_rest(relay)
        self._end_relay(relay)
        return self._ended(code, pid, began, time.monotonic() - clock, relay.last_lines())

    def _wait(self, pid: int, relay: Relay, *, shares_terminal: bool) -> int:
        """Wait for the end of the program, passing signals on."""
        while (code := self._processes.ending(pid)) is None:
            received = self._signals.take(_LOOK_SECS)
            self._runs.look()
            if received is None:
                continue
            if received.number == signal.SIGWINCH:
                relay.resized()
            elif received.number in STOPS and not self._is_first_request():
                if self._is_second_request():
                    self._say(f"a second {_name(received.number)}: the program and all that it has started are killed")
                    self._processes.kill_all(relay.pid, pid)
            elif received.number != signal.SIGCHLD and not (shares_terminal and received.is_from_kernel):
                # What the terminal sends has reached the program already.
                send(pid, received.number)
        return code

    def _is_first_request(self) -> bool:
        """Whether the request to stop that came just now is the first; it is noted."""
        if self._stop_asked is not None:
            return False
        self._stop_asked = time.monotonic()
        return True

    def _is_second_request(self) -> bool:
        """Whether a request that is not the first is more than its echo: the program would end at once by that."""
        return self._stop_asked is not None and time.monotonic() - self._stop_asked > _ONE_REQUEST_SECS

    def _end_the_rest(self, relay: Relay) -> None:
        """What the program has left behind gets SIGTERM too, once, and then SIGKILL: two of a run would be too many."""
        deadline = time.monotonic() + self._grace_secs
        asked: set[int] = set()
        while orphans := self._processes.orphans(relay.pid):
            for pid in set(orphans) - asked:
                send(pid, signal.SIGTERM)
            asked.update(orphans)
            received = self._signals.take(min(_LOOK_SECS, max(0.0, deadline - time.monotonic())))
            is_request = received is not None and received.number in STOPS and not self._is_first_request()
            if (is_request and self._is_second_request()) or time.monotonic() >= deadline:
                self._say("processes that the program has left behind are killed")
                self._processes.kill_all(relay.pid)
                return

    def _end_relay(self, relay: Relay) -> None:
        """Have the program's last words. What has left itself behind, and holds them open, is not waited for."""
        deadline = time.monotonic() + _RELAY_SECS
        while self._processes.ending(relay.pid) is None and (left := deadline - time.monotonic()) > 0:
            received = self._signals.take(min(left, 0.1))
            if received is not None and received.number in STOPS:
                self._is_first_request()
        relay.close()

    def _ended(self, code: int, pid: int, began: float, secs: float, lines: Sequence[str]) -> Ended:
        self._runs.look()
        since = began - 0.001
        stop = self._runs.stop(since)
        why = self._runs.cause(since) or next((one.strip() for one in reversed(lines) if _says(one)), "")
        failure = Failure(_ending(code), output.printable(why)[:500])
        ended = Ended(code, pid, secs, self._runs.has_progressed(since), failure, tuple(lines[-_SHOWN_LINES:]))
        self._runs.tell(
            "exit",
            time.time(),
            attempt=self._attempt,
            child_pid=pid,
            code=code if code >= 0 else None,
            signal=_name(-code) if code < 0 else None,
            secs=round(secs, 3),
            progressed=ended.has_progressed,
            failure=str(failure) if code != 0 else None,
        )
        self._stopped_by = None if stop is None else stop.get("reason")
        return ended

    # --- what follows ---

    def _exit_code(self, ended: Ended) -> int | None:
        """The exit code, if the program is not started again; else it returns when it is time for the next start."""
        if ended.code == 0 or self._stop_asked is not None:
            return ended.exit_code
        if ended.code in (USAGE, CANNOT_EXECUTE, NOT_FOUND):
            self._say(f"not started again: {ended.failure.ending} means that it was called wrongly")
            return ended.exit_code
        if self._was_asked_to_stop(ended):
            self._say(f"not started again: it was asked to stop ({ended.failure.ending})")
            return ended.exit_code
        next_ = self._restarts.after(ended.failure, has_progressed=ended.has_progressed)
        if isinstance(next_, GiveUp):
            return self._give_up(next_, ended)
        return None if self._is_back(next_, ended) else ended.exit_code

    def _was_asked_to_stop(self, ended: Ended) -> bool:
        if ended.exit_code == 128 + signal.SIGINT or self._stopped_by == "interrupt":
            return True
        return ended.exit_code == 128 + signal.SIGTERM and self._stopped_by == "sigterm"

    def _give_up(self, why: GiveUp, ended: Ended) -> int:
        self._runs.tell("gave_up", time.time(), reason=why.reason, failure=str(ended.failure))
        if why is CRASH_LOOP:
            self._say(
                f"crash loop, not started again: {SAME_FAILURES} starts in a row made no progress and ended in the "
                f"same way ({ended.failure}); mend that, and start it again:\n  {shlex.join(self._argv)}"
            )
        else:
            done = output.counted(self._restarts.done, "restart")
            self._say(f"not started again after {done}, which is what --max-restarts allows: {ended.failure}")
        if ended.lines:
            self._say(
                "the last lines of the failure:\n" + "\n".join(f"  {output.printable(one)}" for one in ended.lines)
            )
        return CRASH_LOOP_EXIT if why is CRASH_LOOP else ended.exit_code

    def _is_back(self, restart: Restart, ended: Ended) -> bool:
        """Wait until it is time for the next start; False if a request to stop comes before."""
        self._runs.tell("restart", time.time(), attempt=self._attempt + 1, delay_secs=round(restart.delay_secs, 3))
        progress = "with" if ended.has_progressed else "without"
        self._say(
            f"ended after {duration(ended.secs)}, {progress} progress: {ended.failure}; "
            f"restart {restart.number} in {restart.delay_secs:.1f} s"
        )
        deadline = time.monotonic() + restart.delay_secs
        while (left := deadline - time.monotonic()) > 0:
            received = self._signals.take(left)
            if received is not None and received.number in STOPS:
                self._stop_asked = time.monotonic()
                self._say(f"{_name(received.number)}: not started again")
                return False
        return self._stop_asked is None


def _is_in_foreground() -> bool:
    """Whether the terminal of this process sends its Ctrl-C to this process group, and so to a program in it."""
    for descriptor in (0, 1, 2):
        try:
            return os.tcgetpgrp(descriptor) == os.getpgrp()
        except OSError:
            continue
    return False


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else _name(-code)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def _says(line: str) -> bool:
    """Whether a line has words, and is not a rule below or above others."""
    return any(one.isalpha() for one in line)
