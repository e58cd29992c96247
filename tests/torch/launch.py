"""Starting several processes of the distributed test program, or of another, and reading what they have noted."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from forked import begin, fork

from stepguard.store import CheckpointStore

PROGRAM = Path(__file__).with_name("distributed_training.py")


def run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def torchrun_command(logdir: Path, processes: int, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*command, "--max-restarts=0", "--monitor-interval=0.1", str(PROGRAM), f"--logdir={logdir}", *arguments]


def outcomes(logdir: Path, processes: int) -> list[str]:
    return [logdir.with_suffix(f".outcome-{rank}").read_text() for rank in range(processes)]


def seen(logdir: Path, rank: int) -> dict[int, list[int]]:
    lines = logdir.with_suffix(f".seen-{rank}").read_text().splitlines()
    return {int(step): json.loads(batch) for step, batch in (line.split(" ", 1) for line in lines)}


def steps_saved(logdir: Path) -> list[int]:
    return [one.step for one in CheckpointStore(logdir).candidates()]


def began(logdir: Path, processes: int) -> list[str]:
    return [logdir.with_suffix(f".began-{rank}").read_text() for rank in range(processes)]


class Member:
    """One of the processes, forked from one that has imported PyTorch; torchrun and each of its own import it anew."""

    def __init__(self, program: Path, logdir: Path, arguments: tuple[str, ...], place: dict[str, str]) -> None:
        # Beside the logdir, in a new file for each start.
        starts = len(list(logdir.parent.glob(f"{logdir.name}.output-*")))
        self._output = logdir.with_suffix(f".output-{starts}")
        self._output.touch()
        self._process = fork(_run, str(self._output), [str(program), f"--logdir={logdir}", *arguments], place)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.is_alive(), self._output.read_text()
        os.kill(self._process.pid, number)

    def end(self, timeout_secs: float = 150) -> str:
        """Wait for its end; what it has written to stdout and stderr."""
        self._process.join(timeout_secs)
        said = self._output.read_text()
        assert self.returncode is not None, said
        return said


def _run(output: str, argv: list[str], place: dict[str, str]) -> None:
    begin(output)
    os.environ.update(place)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except KeyboardInterrupt as error:
        # As the interpreter ends a program that lets it through; multiprocessing would print its own words.
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def start(logdir: Path, processes: int, *arguments: str, program: Path = PROGRAM) -> list[Member]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    places = [{**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [Member(program, logdir, arguments, place) for place in places]


def train(
    logdir: Path,
    processes: int,
    *arguments: str,
    killed: Collection[int] = (),
    well: bool = True,
    program: Path = PROGRAM,
) -> list[str]:
    """Start so many and wait for their ends; what each has written.

    They end well, or those of the ranks ``killed`` by SIGKILL and the others because they have lost them.
    """
    members = start(logdir, processes, *arguments, program=program)
    said = [member.end(300) for member in members]
    codes = [member.returncode for member in members]
    if killed or not well:
        assert all(codes), said
    else:
        assert codes == [0] * processes, said
    assert all(codes[rank] == -signal.SIGKILL for rank in killed), said
    return said


def terminate_one(logdir: Path, rank: int, *arguments: str, by: signal.Signals = signal.SIGTERM) -> list[str]:
    """Send a signal to one of two processes, in the middle of the training; what each has written."""
    members = start(logdir, 2, "--steps=100000", *arguments)
    deadline = time.monotonic() + 120
    awaited = [".seen-0", ".seen-1", *([".evaluating"] if "--loop-steps=5" in arguments else [])]
    while not all(logdir.with_suffix(one).exists() for one in awaited) or not steps_saved(logdir):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    members[rank].send_signal(by)
    said = [member.end() for member in members]

    assert members[rank].returncode == -by, said
    assert members[1 - rank].returncode == 0, said
    return said
