"""The life of `stepguard run`: start a program, pass signals on, and start it again when it has crashed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stepguard.cli.launcher.launched_logdirs import LaunchedLogdirs
from stepguard.cli.launcher.passing import WARNINGS, is_request, passed_on
from stepguard.cli.launcher.processes import Processes, send
from stepguard.cli.launcher.relay import Relay
from stepguard.cli.launcher.restarts import CRASH_LOOP, SAME_FAILURES, Crash, GiveUp, Restart, Restarts
from stepguard.cli.launcher.signal_queue import STOPS, SignalQueue
from stepguard.cli.text import output
from stepguard.disk.system import process_start
from stepguard.stops import FINISHED, PREEMPTIONS, REASON_OF, REQUESTS
from stepguard.watching import launcher_link
from stepguard.watching.history import History
from stepguard.words import duration, printable

CRASH_LOOP_EXIT = 70
"""The exit code for a crash loop: EX_SOFTWARE of sysexits.h."""
USAGE, CANNOT_EXECUTE, NOT_FOUND = 2, 126, 127
"""The exit codes, as in a shell, of a program that was called wrongly, cannot be executed, or does not exist."""

_LOOK_SECS = 0.5
# Two signals within this time are one request: `timeout` and some schedulers signal a process and then its group.
_ONE_REQUEST_SECS = 0.5
_RELAY_SECS = 1.0
_SHOWN_LINES = 10
_ERROR = re.compile(r"error|exception|fatal|abort|panic|fault|terminate called|assert", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How one start of the program ended. ``code`` is negative for a signal.

    ``is_repeated`` says that its traceback is that of the start before.
    """

    code: int
    pid: int
    secs: float
    has_progressed: bool
    failure: Crash
    lines: tuple[str, ...]
    is_repeated: bool

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports: 128 + n for signal n."""
        return self.code if self.code >= 0 else 128 - self.code


class Launcher:
    """Starts ``argv`` until it has ended well, was asked to stop, or cannot succeed. The main thread, once.

    Args:
        argv: the program and its arguments.
        logdir: where its run leaves its files; ``None`` waits for the program to announce it.
        restarts: decides after each crash.
        grace_secs: how long the processes that the program has left behind may take to stop.
        announcements: the directory in which the program announces its logdir, for another who wants to know it; by
            default one that is removed at the end.
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
        announcements: Path | None = None,
    ) -> None:
        self._argv = list(argv)
        self._logdir = logdir
        self._restarts = restarts
        self._grace_secs = grace_secs
        self._announcements = announcements
        self._say = say
        self._processes = Processes()
        self._signals = SignalQueue()
        self._logdirs: LaunchedLogdirs
        # When the launcher was asked to stop, and the signal by which it was, or by which a scheduler gave a warning.
        self._stop_asked: float | None = None
        self._asked_by: int | None = None
        self._sent: set[int] = set()
        self._announced_in = Path()
        # The `stop` line of the chief of the last start.
        self._stop: Mapping[str, Any] = {}
        self._last_code: int | None = None
        self._output_before = b""
        self._attempt = 0
        # A millisecond earlier, because the ledger rounds its times.
        self._began = time.time() - 0.001

    def run(self) -> int:
        """The exit code: the program's own last one, 128 + n for signal n, or `CRASH_LOOP_EXIT`."""
        with self._signals, self._place_of_announcements() as announcements:
            self._announced_in = Path(announcements)
            self._logdirs = LaunchedLogdirs(self._logdir, self._announced_in)
            environment = {**os.environ, launcher_link.LAUNCHER_DIR: announcements}
            while True:
                self._attempt += 1
                ended = self._start({**environment, launcher_link.ATTEMPT: str(self._attempt)})
                if isinstance(ended, int):
                    return ended
                if (exit_code := self._exit_code(ended)) is not None:
                    return exit_code

    def _place_of_announcements(self) -> AbstractContextManager[str]:
        if self._announcements is not None:
            return nullcontext(os.fspath(self._announcements))
        return TemporaryDirectory(prefix="stepguard-run-", ignore_cleanup_errors=True)

    @property
    def request(self) -> str | None:
        """The reason of the stop request to the last start, as in the ledger; None if its chief recorded none."""
        reason = self._stop.get("reason")
        return reason if reason in REQUESTS else None

    @property
    def preemption(self) -> str | None:
        """Why the last start, or the launcher, was stopped for another job or at the end of its time, in a word of the
        ledger; None if the run has finished, failed, or was stopped by its user or by itself.
        """
        if self.request is not None:
            return self.request if self.request in PREEMPTIONS else None
        is_over = self._stop.get("reason") == FINISHED or (self._last_code == 0 and not self._stop)
        reason = REASON_OF.get(signal.Signals(self._asked_by)) if self._asked_by is not None else None
        return reason if reason in PREEMPTIONS and not is_over else None

    def histories(self) -> list[tuple[Path, History]]:
        """The history since `run` began, for every logdir that became known."""
        return self._logdirs.histories(self._began)

    # --- one start ---

    def _start(self, environment: dict[str, str]) -> AttemptEnd | int:
        """Run one start until its last process has ended. Returns the exit code if the program could not be started."""
        relay = Relay(before=self._output_before)
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
            self._say(f"{printable(self._argv[0])} could not be started: {error.strerror or error}")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_EXECUTE
        finally:
            relay.program_has_it()
        self._logdirs.record(
            "launch",
            began,
            attempt=self._attempt,
            argv=self._argv,
            child_pid=pid,
            process_start=process_start(os.getpid()),
        )
        code = self._wait(pid, relay, shares_terminal=shares_terminal)
        if code != 0:
            self._end_the_rest(relay)
        self._end_relay(relay)
        self._output_before = relay.kept
        return self._ended(code, pid, began, time.monotonic() - clock, relay)

    def _wait(self, pid: int, relay: Relay, *, shares_terminal: bool) -> int:
        """Wait for the end of the program, passing signals on."""
        while (code := self._processes.ending(pid)) is None:
            received = self._signals.take(_LOOK_SECS)
            self._logdirs.find_announced()
            if received is None:
                continue
            if received.number == signal.SIGWINCH:
                relay.resized()
            elif received.number in STOPS and not self._is_first_request(received.number):
                if self._is_second_request():
                    self._say(f"a second {_name(received.number)}: the program and all that it has started are killed")
                    self._processes.kill_all(relay.pid, pid)
            elif received.number != signal.SIGCHLD and not (shares_terminal and received.is_from_kernel):
                # The terminal has already sent the signal to the program.
                self._pass_on(received.number, pid)
        return code

    def _pass_on(self, number: int, pid: int) -> None:
        """Send the program ``number``, or the request to stop that stands for it."""
        answered = launcher_link.answered(self._announced_in, pid)
        sent = passed_on(number, pid, answered)
        if is_request(number, sent, answered):
            self._asked_by = self._asked_by or number
        if sent in STOPS and sent in self._sent:
            # A program ends at once by a second one, and this is the scheduler's request after its warning.
            return
        self._sent.add(sent)
        if sent != number:
            self._say(f"{_name(number)} would kill the program, which gets {_name(sent)} instead")
        send(pid, sent)
        if sent in STOPS:
            # A program that is suspended could not obey.
            send(pid, signal.SIGCONT)

    def _is_first_request(self, number: int) -> bool:
        """Note a request to stop; whether it is the first."""
        if self._stop_asked is not None:
            return False
        self._stop_asked = self._signals.awake()
        self._asked_by = self._asked_by or number
        return True

    def _is_second_request(self) -> bool:
        """Whether the request is more than an echo of the first. A second request kills the program."""
        return self._stop_asked is not None and self._signals.awake() - self._stop_asked > _ONE_REQUEST_SECS

    def _end_the_rest(self, relay: Relay) -> None:
        """End what the program left behind, by SIGTERM and then SIGKILL: the next start must run alone."""
        deadline = self._signals.awake() + self._grace_secs
        asked: set[int] = set()
        while orphans := self._processes.orphans(relay.pid):
            for pid in set(orphans) - asked:
                send(pid, signal.SIGTERM)
            asked.update(orphans)
            received = self._signals.take(min(_LOOK_SECS, max(0.0, deadline - self._signals.awake())))
            is_later = received is not None and received.number in STOPS and not self._is_first_request(received.number)
            if (is_later and self._is_second_request()) or self._signals.awake() >= deadline:
                self._say("processes that the program has left behind are killed")
                self._processes.kill_all(relay.pid)
                return

    def _end_relay(self, relay: Relay) -> None:
        """Wait until the program's last output was passed on, but not for leftover processes with the pipe open."""
        deadline = self._signals.awake() + _RELAY_SECS
        while self._processes.ending(relay.pid) is None and (left := deadline - self._signals.awake()) > 0:
            received = self._signals.take(min(left, 0.1))
            if received is not None and received.number in STOPS:
                self._is_first_request(received.number)
        relay.close()

    def _ended(self, code: int, pid: int, began: float, secs: float, relay: Relay) -> AttemptEnd:
        self._logdirs.find_announced()
        since = began - 0.001
        stop = self._logdirs.last_stop(since)
        lines = relay.last_lines()
        why = self._logdirs.cause(since) or _last_words(lines, code)
        failure = Crash(_ending(code), printable(why)[:500])
        has_progressed, shown = self._logdirs.has_progressed(since), tuple(lines[-_SHOWN_LINES:])
        ended = AttemptEnd(code, pid, secs, has_progressed, failure, shown, relay.is_repeated)
        self._logdirs.record(
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
        self._stop, self._last_code = stop or {}, code
        return ended

    # --- what follows ---

    def _exit_code(self, ended: AttemptEnd) -> int | None:
        """The exit code if the program is not started again; None, after the delay, if it is."""
        if ended.code == 0 or self._asked_by is not None or self._has_finished(ended):
            return ended.exit_code
        is_chosen = ended.code == self._stop.get("exit_code")
        if not is_chosen and ended.code in (USAGE, CANNOT_EXECUTE, NOT_FOUND):
            self._say(f"not started again: {ended.failure.ending} means that it was called wrongly")
            return ended.exit_code
        if self._was_asked_to_stop(ended):
            self._say(f"not started again: it was asked to stop ({ended.failure.ending})")
            return ended.exit_code
        next_ = self._restarts.after(ended.failure, has_progressed=ended.has_progressed)
        if isinstance(next_, GiveUp):
            return self._give_up(next_, ended)
        return None if self._is_back(next_, ended) else ended.exit_code

    def _has_finished(self, ended: AttemptEnd) -> bool:
        """Whether the run came to its end, and the program ended with the exit code that it has chosen for that."""
        return self._stop.get("reason") == FINISHED and ended.code == self._stop.get("exit_code")

    def _was_asked_to_stop(self, ended: AttemptEnd) -> bool:
        if ended.exit_code == 128 + signal.SIGINT or self.request == "interrupt":
            return True
        if self.request is not None and ended.exit_code == self._stop.get("exit_code"):
            return True
        asked_by = {128 + number: reason for number, reason in REASON_OF.items()}
        return self.request is not None and asked_by.get(ended.exit_code) == self.request

    def _give_up(self, why: GiveUp, ended: AttemptEnd) -> int:
        self._logdirs.record("gave_up", time.time(), reason=why.reason, failure=str(ended.failure))
        if why is CRASH_LOOP:
            self._say(
                f"crash loop, not started again: {SAME_FAILURES} starts in a row made no progress and ended in the "
                f"same way ({ended.failure}); mend that, and start it again:\n  "
                f"{printable(shlex.join(self._argv))}"
            )
        else:
            done = output.counted(self._restarts.done, "restart")
            self._say(f"not started again after {done}, which is what --max-restarts allows: {ended.failure}")
        if ended.lines and not ended.is_repeated:
            self._say("the last lines of the failure:\n" + "\n".join(f"  {printable(one)}" for one in ended.lines))
        return CRASH_LOOP_EXIT if why is CRASH_LOOP else ended.exit_code

    def _is_back(self, restart: Restart, ended: AttemptEnd) -> bool:
        """Wait for the next start; False if a request to stop comes first."""
        self._logdirs.record("restart", time.time(), attempt=self._attempt + 1, delay_secs=round(restart.delay_secs, 3))
        progress = "with" if ended.has_progressed else "without"
        same = self._restarts.same_failures
        failure = str(ended.failure) if same < 2 else f"the same failure, {same} times in a row"
        failure += " (traceback as before)" if ended.is_repeated and same < 2 else ""
        self._say(
            f"ended after {duration(ended.secs)}, {progress} progress: {failure}; "
            f"restart {restart.number} in {restart.delay_secs:.1f} s"
        )
        deadline = time.monotonic() + restart.delay_secs
        while (left := deadline - time.monotonic()) > 0:
            received = self._signals.take(left)
            if received is not None and received.number in (*STOPS, *WARNINGS):
                self._is_first_request(received.number)
                self._say(f"{_name(received.number)}: not started again")
                return False
        return self._asked_by is None


def _is_in_foreground() -> bool:
    """Whether Ctrl-C in the terminal goes to this process group, and so to a program in it."""
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


def _last_words(lines: Sequence[str], code: int) -> str:
    """The last line with words, or "". After a signal, which leaves a program no time for last words, a line counts
    only if it mentions an error.
    """
    said = [line.strip() for line in lines if any(one.isalpha() for one in line)]
    if code < 0:
        said = [line for line in said if _ERROR.search(line)]
    return said[-1] if said else ""
