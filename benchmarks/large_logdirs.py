"""What a start and the commands cost in a logdir with many checkpoints, and with the heartbeats of many processes.

    python benchmarks/large_logdirs.py [--checkpoints 10 1000 10000] [--processes 1 100 1000] [--repeats 3]

The checkpoints are directories with one small file, as those of PyTorch: the bytes of large states are not what grows
with their number. Measured is the processor time of this process, without the start of the interpreter: other programs
on the machine change it little, and what is read is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner
from common import median, print_machine, print_table

from stepguard.cli.main import cli
from stepguard.disk import files
from stepguard.options import Saving
from stepguard.store import FileRecord, Manifest, statefile
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat

SIZE = 4
COMMANDS = {"ls": ["ls"], "status": ["status"], "prune (dry run)": ["prune", "--keep-last", "1", "--dry-run"]}


def fill(logdir: Path, checkpoints: int, processes: int) -> None:
    """Make so many checkpoints, as a run that keeps all has left them, and heartbeats."""
    train(logdir / "one")
    state = (logdir / "one" / "model.ckpt-1" / "state.json").read_bytes()
    names = []
    for step in range(1, checkpoints + 1):
        name = f"model.ckpt-{step}"
        content = state.replace(b'"step": 1', f'"step": {step}'.encode())
        (logdir / name).mkdir()
        (logdir / name / "state.json").write_bytes(content)
        record = FileRecord(f"{name}/state.json", len(content), files.digest_bytes(content))
        manifest = Manifest(name, "fake", step, 1e9 + step, (record,))
        (logdir / f"{name}.manifest.json").write_bytes(manifest.to_json())
        names.append(name)
    statefile.write(logdir, names[-1], names)
    heartbeat.prepare(logdir)
    for rank in range(processes):
        role = "chief" if rank == 0 else f"worker-{rank}"
        heartbeat.write(logdir, heartbeat.Heartbeat(role, host="elsewhere", phase="training", step=checkpoints))


def train(logdir: Path) -> None:
    """One start and one step."""
    options = {"save_model_secs": 0, "saving": Saving(save_at_end=True, max_to_keep=0)}
    with FakeSupervisor(str(logdir), size=SIZE, **options).managed_session() as session:
        session.run_step()


def start(logdir: Path) -> float:
    """The processor time until a start trains, in seconds."""
    began = time.process_time()
    with FakeSupervisor(str(logdir), size=SIZE, saving=Saving(save_model_secs=3600, max_to_keep=0)).managed_session():
        return time.process_time() - began


def command(arguments: list[str], logdir: Path) -> float:
    """The processor time of a command, in seconds."""
    began = time.process_time()
    done = CliRunner().invoke(cli, [arguments[0], str(logdir), *arguments[1:]])
    secs = time.process_time() - began
    if done.exit_code not in (0, 1):
        raise SystemExit(f"{arguments}: {done.exit_code}: {done.output[-2000:]}")
    return secs


def measure(checkpoints: int, processes: int, repeats: int) -> list[object]:
    """The milliseconds of each."""
    with tempfile.TemporaryDirectory() as folder:
        logdir = Path(folder)
        fill(logdir, checkpoints, processes)
        # As if nothing had changed for a while.
        os.utime(logdir, (1e9, 1e9))
        calls: list[Callable[[], float]] = [
            *(lambda arguments=arguments: command(arguments, logdir) for arguments in COMMANDS.values()),
            lambda: heartbeat_secs(logdir),
            lambda: start(logdir),
        ]
        return [checkpoints, processes, *(1e3 * median([call() for _ in range(repeats)]) for call in calls)]


def heartbeat_secs(logdir: Path) -> float:
    """The processor time of one heartbeat, in seconds: what each process does every two seconds."""
    one = heartbeat.Heartbeat("worker-7", host="elsewhere", phase="training")
    began = time.process_time()
    heartbeat.write(logdir, one)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[10, 1000, 10_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print_machine()
    sizes = [(count, 1) for count in given.checkpoints]
    sizes += [(given.checkpoints[0], count) for count in given.processes if count != 1]
    rows = [measure(*size, given.repeats) for size in sizes]
    print("Milliseconds of processor time:\n")
    print_table(["checkpoints", "processes", *COMMANDS, "a heartbeat", "start"], rows)


if __name__ == "__main__":
    main()
