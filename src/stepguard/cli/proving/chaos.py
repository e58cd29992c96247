"""Random faults for a run that is meant to stay: it runs under the launcher, in its own logdir."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepguard.cli.launcher.processes import descendants_of, send
from stepguard.cli.proving.faults import damage_newest, is_saving
from stepguard.cli.proving.full_disk import FullDisk
from stepguard.watching import heartbeat, history, launcher_link, ledger
from stepguard.watching.heartbeat import Heartbeat

KINDS = ("kill", "save", "damage", "disk", "process")
"""The faults after which the launcher starts a program again, or it goes on."""

_LOOK_SECS = 0.1
_SAVE_SECS = 30.0
_FULL_SECS = 3.0
# Restarts that are no fault of the program's do not use up those that the launcher allows. Faults come at random: many
# more than the mean are as good as impossible.
_RESTARTS = 100
_MOST_OF_MEAN = 4


@dataclass(slots=True)
class Outcome:
    """What came of it: the faults by kind, the launcher's exit code, the replays by their outcome, and the first
    message of one that differs.
    """

    code: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    replays: Counter[str] = field(default_factory=Counter)
    steps_again: int = 0
    differs: str | None = None


class Chaos:
    """Starts ``argv`` under `stepguard run`, and puts it through faults for ``lasts_secs``.

    ``every_secs`` is the mean time between two faults. ``announcements`` is an empty directory.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        kinds: Sequence[str],
        lasts_secs: float,
        every_secs: float,
        seed: int,
        announcements: Path,
        say: Callable[[str], object],
    ) -> None:
        self._argv = list(argv)
        self._kinds = list(kinds)
        self._lasts_secs = lasts_secs
        self._every_secs = every_secs
        self._chance = random.Random(seed)
        self._announcements = announcements
        self._say = say
        self._began = time.time()
        # A kind that could never be done is told as well.
        self._outcome = Outcome(faults=Counter(dict.fromkeys(kinds, 0)))

    def command(self) -> list[str]:
        """The command that starts the program under the launcher."""
        restarts = _RESTARTS + round(_MOST_OF_MEAN * self._lasts_secs / self._every_secs)
        command = [sys.executable, "-m", "stepguard", "run", "--first-delay-secs=0.1", f"--max-restarts={restarts}"]
        return [*command, f"--announcements={self._announcements}", "--", *self._argv]

    def run(self) -> Outcome:
        """Run the program to its end. The main thread, once: requests to stop are passed on to the launcher."""
        launcher = subprocess.Popen(self.command())
        # A terminal sends Ctrl-C to the launcher as well.
        before = (
            signal.signal(signal.SIGINT, signal.SIG_IGN),
            signal.signal(signal.SIGTERM, lambda number, _: launcher.send_signal(number)),
        )
        try:
            self._attack(launcher)
            code = launcher.wait()
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
                signal.signal(number, handler)
        self._outcome.code = code if code >= 0 else 128 - code
        self._read_replays()
        return self._outcome

    def _attack(self, launcher: subprocess.Popen[bytes]) -> None:
        # The time begins with the training: to import a framework may take longer than it.
        while launcher.poll() is None and not self._training():
            time.sleep(_LOOK_SECS)
        ends = time.monotonic() + self._lasts_secs
        while launcher.poll() is None and time.monotonic() < ends:
            pause = self._chance.expovariate(1 / self._every_secs)
            if self._sleep(launcher, min(pause, max(0.0, ends - time.monotonic()))) and time.monotonic() < ends:
                self._do(self._chance.choice(self._kinds), launcher)
        if launcher.poll() is None:
            self._say("no more faults: the program goes on to its end")

    def _sleep(self, launcher: subprocess.Popen[bytes], secs: float) -> bool:
        """Wait; ``False`` if the launcher ends before."""
        deadline = time.monotonic() + secs
        while (left := deadline - time.monotonic()) > 0:
            if launcher.poll() is not None:
                return False
            time.sleep(min(_LOOK_SECS, left))
        return True

    def _logdir(self) -> Path | None:
        found = [one for one in launcher_link.announced(self._announcements) if one.is_dir()]
        return found[0] if found else None

    def _training(self) -> list[Heartbeat]:
        logdir = self._logdir()
        return [] if logdir is None else training(logdir)

    def _do(self, kind: str, launcher: subprocess.Popen[bytes]) -> None:
        logdir, beats = self._logdir(), self._training()
        # One process is the program itself; to kill one of several is another fault.
        if logdir is None or not beats or (kind == "process" and len(beats) < 2):
            return
        told = self._done(kind, logdir, beats, launcher)
        if told is not None:
            self._outcome.faults[kind] += 1
            self._say(f"{kind}{told} at about step {beats[0].step}")

    def _done(
        self, kind: str, logdir: Path, beats: Sequence[Heartbeat], launcher: subprocess.Popen[bytes]
    ) -> str | None:
        """Do it; ``None`` if it could not be done."""
        if kind == "disk":
            return self._fill_disk(beats, launcher)
        if kind == "process":
            victim = self._chance.choice(beats)
            send(victim.pid, signal.SIGKILL)
            return f" {victim.role} killed"
        if kind == "save":
            deadline = time.monotonic() + _SAVE_SECS
            while not is_saving(logdir):
                if time.monotonic() > deadline or launcher.poll() is not None:
                    return None
                time.sleep(0.001)
        for one in beats:
            send(one.pid, signal.SIGKILL)
        if kind == "damage":
            file = damage_newest(logdir, self._chance.random())
            return None if file is None else f": a bit of {file} flipped, and killed"
        return " interrupted" if kind == "save" else ""

    def _fill_disk(self, beats: Sequence[Heartbeat], launcher: subprocess.Popen[bytes]) -> str | None:
        disk = FullDisk(one.pid for one in beats)
        ends = time.monotonic() + _FULL_SECS
        while time.monotonic() < ends and self._sleep(launcher, _LOOK_SECS):
            disk.spare(descendants_of(launcher.pid))
        disk.end(descendants_of(launcher.pid))
        return f" full for {_FULL_SECS:g} s" if disk.is_full else None

    def _read_replays(self) -> None:
        logdir = self._logdir()
        events: Iterable[dict[str, Any]] = [] if logdir is None else ledger.read_whole(logdir)
        for one in events:
            if one["event"] == "replay" and one["time"] >= self._began and one.get("role") == history.CHIEF:
                self._outcome.replays[str(one.get("outcome"))] += 1
                self._outcome.steps_again += int(one.get("compared") or 0)
                if one.get("outcome") == "differs" and self._outcome.differs is None:
                    self._outcome.differs = str(one.get("message"))


def training(logdir: Path) -> list[Heartbeat]:
    """The processes that train in a logdir now, the chief first."""
    return [one for one in heartbeat.read(logdir) if one.phase == "training" and heartbeat.state(one) == "alive"]
