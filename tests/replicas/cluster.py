"""A cluster of real processes on loopback, for tests that kill, stop and restart them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from stepguard.watching import ledger

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "process"))

from forks import Forks  # noqa: E402

# More than anything here takes on a busy machine.
SOON_SECS = 120.0


def wait_until(condition: Callable[[], Any], what: str, timeout_secs: float = SOON_SECS) -> Any:
    """Wait for ``condition`` and return what it gave, or fail saying ``what`` did not come."""
    deadline = time.monotonic() + timeout_secs
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_secs:g} s"
        time.sleep(0.005)
    return found


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections.

    A port of a killed server would else be taken by somebody's connection before the server is started again.
    """
    found: list[int] = []
    while len(found) < number:
        port = random.randrange(15000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


# What they are forked from makes neither a session nor a server. It does not know the path of the tests.
FORKS = Forks(["tensorflow", "stepguard.tensorflow"])


class Task:
    """One process, and those that took its place: their reports go on in one list."""

    def __init__(self, name: str, place: Path) -> None:
        self.name = name
        self._place = place
        self._arguments: tuple[str, dict[str, Any]] | None = None
        self.process: Any = None
        self._began = 0
        place.mkdir(parents=True)

    def start(self, function: str, **arguments: Any) -> Task:
        self._arguments = (function, arguments)
        return self.restart()

    def restart(self) -> Task:
        """Start the process again, as it was started before."""
        assert self._arguments is not None
        assert not self.is_alive()
        import task

        self._began = len(self.reports(since_start=False))
        function, arguments = self._arguments
        self.process = FORKS.start(task.main, function, str(self._place), arguments, daemon=True)
        return self

    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def kill(self) -> None:
        """SIGKILL, and see it dead."""
        self.process.kill()
        self.process.join()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    @property
    def output(self) -> str:
        path = self._place / "output"
        return path.read_text(errors="replace") if path.exists() else ""

    def reports(self, kind: str | None = None, *, since_start: bool = True) -> list[dict[str, Any]]:
        """What it has reported since it was last started; a line that a kill cut short was not said."""
        path = self._place / "reports"
        if not path.exists():
            return []
        text = path.read_text()
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        lines = lines[self._began :] if since_start else lines
        return [line for line in lines if kind is None or line["kind"] == kind]

    def wait_for(self, kind: str, timeout_secs: float = SOON_SECS, after: float = 0.0, **fields: Any) -> dict[str, Any]:
        """Wait for a report of that kind with those fields, made at ``after`` (Unix time) or later."""

        def look() -> dict[str, Any] | None:
            for line in self.reports(kind):
                if line["time"] >= after and all(line.get(key) == value for key, value in fields.items()):
                    return line
            assert self.is_alive() or kind in ("ended", "failed", "lost", "left"), self.story()
            return None

        try:
            return wait_until(look, f"{self.name}: {kind}", timeout_secs)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def wait_for_step(self, step: int, timeout_secs: float = SOON_SECS) -> int:
        """Wait until it has trained to at least ``step``."""

        def look() -> int:
            steps = self.reports("step")
            found = steps[-1]["step"] if steps and steps[-1]["step"] >= step else 0
            assert found or self.is_alive(), f"it has ended\n{self.story()}"
            return found

        try:
            return wait_until(look, f"{self.name}: step {step}", timeout_secs)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    @property
    def step(self) -> int:
        steps = self.reports("step")
        return steps[-1]["step"] if steps else 0

    def join(self, timeout_secs: float = SOON_SECS) -> int:
        """Wait for its end; the exit code."""
        self.process.join(timeout_secs)
        assert not self.process.is_alive(), f"{self.name} did not end in {timeout_secs:g} s\n{self.story()}"
        return self.process.exitcode

    def story(self) -> str:
        last = "\n".join(json.dumps(line) for line in self.reports()[-5:])
        return f"--- {self.name}: last reports\n{last}\n--- output\n{self.output[-3000:]}"


@final
class Link:
    """A network namespace for the parameter servers, and the one cable that leads there. Needs root and ``ip``."""

    def __init__(self) -> None:
        number = os.getpid() % 200
        self.namespace = f"stepguard{os.getpid()}"
        self._cable = f"sg{os.getpid()}"
        self.here, self.there = f"10.213.{number}.1", f"10.213.{number}.2"

    def __enter__(self) -> Link:
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _ip("addr", "add", f"{self.here}/24", "dev", self._cable)
        _ip("link", "set", self._cable, "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.there}/24", "dev", "eth0")
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        _ip("netns", "del", self.namespace)

    def cut(self) -> None:
        """From now on packets are lost without a word."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def mend(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    @staticmethod
    def is_possible() -> bool:
        """Whether this machine lets us make one."""
        try:
            with Link():
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cluster:
    """``ps`` parameter servers and ``workers`` workers, of which number 0 is the chief."""

    def __init__(self, place: Path, *, ps: int = 1, workers: int = 2, link: Link | None = None) -> None:
        if str(HERE) not in sys.path:
            sys.path.insert(0, str(HERE))
        ports = free_ports(ps + workers)
        here, there = ("127.0.0.1", "127.0.0.1") if link is None else (link.here, link.there)
        self._link = link
        self.spec = {
            "ps": [f"{there}:{port}" for port in ports[:ps]],
            "worker": [f"{here}:{port}" for port in ports[ps:]],
        }
        self.logdir = place / "logdir"
        self.ps = [Task(f"ps{index}", place / f"ps{index}") for index in range(ps)]
        self.workers = [Task(f"worker{index}", place / f"worker{index}") for index in range(workers)]
        self.chief = self.workers[0]

    @property
    def tasks(self) -> list[Task]:
        return [*self.ps, *self.workers]

    def serve(self, index: int = 0) -> Task:
        namespace = None if self._link is None else self._link.namespace
        return self.ps[index].start("serve", cluster=self.spec, index=index, namespace=namespace)

    def train(self, index: int, function: str = "train", **options: Any) -> Task:
        """Start a worker; the chief gets the logdir."""
        supervisor = dict(options.pop("supervisor", {}))
        if index == 0:
            supervisor = {"logdir": str(self.logdir), "save_model_secs": 1, **supervisor}
        return self.workers[index].start(function, cluster=self.spec, index=index, supervisor=supervisor, **options)

    def wait_for_saved(self, count: int = 1, *, after: int = -1) -> list[int]:
        """Wait until ``count`` checkpoints of steps after ``after`` are committed; the steps of all."""

        def look() -> list[int]:
            steps = self.saved_steps()
            assert self.chief.is_alive(), f"it has ended\n{self.chief.story()}"
            return steps if len([one for one in steps if one > after]) >= count else []

        found: list[int] = wait_until(look, f"{count} checkpoints after step {after}")
        return found

    def saved_steps(self) -> list[int]:
        """The steps of the committed checkpoints, in order."""
        return sorted(
            int(path.name.split("-")[1].split(".")[0]) for path in self.logdir.glob("model.ckpt-*.manifest.json")
        )

    def close(self) -> None:
        for task in self.tasks:
            if task.is_alive():
                task.kill()


def restored_step(cluster: Cluster) -> int:
    """The step that the last session was restored at; until its program can look, a worker may have trained."""
    return [one["step"] for one in ledger.read(cluster.logdir) if one["event"] == "restore"][-1]
