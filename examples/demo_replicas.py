"""Train on a parameter server, a chief and two workers; kill a worker, the chief, the server, and see them come back.

This program only starts, kills and watches ``replicas.py``, in processes of its own, as a cluster's scheduler would.
The workers train asynchronously, or in step with ``--sync``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PROGRAM = Path(__file__).with_name("replicas.py")
ENOUGH_ACCURACY = 0.9
LIMIT_SECS = 180.0


class Task:
    """One process of the cluster, and those that take its place; what it prints is shown under its name."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._command = command
        self.lines: list[str] = []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet()
        )
        self._showing = threading.Thread(target=self._show, args=(self.process,), daemon=True)
        self._showing.start()

    def kill(self) -> None:
        """Kill it, if it has not ended by itself, and show the last that it printed."""
        self.process.kill()
        self.process.wait()
        self._showing.join()

    def kill_and_restart(self) -> None:
        print(f"          --- kill -9 {self.name}, and start it again ---", flush=True)
        self.kill()
        self.start()

    def _show(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            if re.match(r"begins|step|test accuracy|Traceback|\w+Error|tensorflow.*Error|lost a server", line):
                # What gRPC says of a lost server is long, and different each time.
                shown = re.sub(r"\((\w+Error): .*\)", r"(\1)", line.rstrip())
                self.lines.append(shown)
                print(f"{self.name:9s} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--logdir",
        type=Path,
        default=Path("runs") / time.strftime("replicas-%Y%m%d-%H%M%S"),
        help="default: %(default)s",
    )
    parser.add_argument("--steps", type=int, default=4000, help="default: %(default)s")
    parser.add_argument("--sync", action="store_true", help="every step waits for the gradients of all workers")
    args = parser.parse_args()
    if importlib.util.find_spec("tensorflow") is None:
        sys.exit("the demo needs tensorflow; `make demo-replicas` installs all that it needs")
    accuracy = run(args.logdir, args.steps, ["--sync"] if args.sync else [])
    print("\nwhat came of it")
    print(f"  test accuracy   {accuracy:.2%}, on 359 digits that it never saw in training")
    print(f"  checkpoints     {args.logdir}/model.ckpt-*")
    if accuracy <= ENOUGH_ACCURACY:
        sys.exit(f"DEMO FAILED: expected a test accuracy over {ENOUGH_ACCURACY:.0%}")
    if not args.sync:
        print("  in step         python examples/demo_replicas.py --sync")


def run(logdir: Path, steps: int, options: list[str]) -> float:
    """Train once, with three deaths on the way; the test accuracy that the chief reports."""
    print(f"\nOne parameter server, a chief and two workers{' in step' if options else ''}, up to step {steps}:\n")
    addresses = [f"localhost:{port}" for port in free_ports(4)]
    common = [sys.executable, str(PROGRAM), "--ps", addresses[0], "--workers", ",".join(addresses[1:])]
    common += ["--logdir", str(logdir), "--steps", str(steps), "--save-model-secs", "0.5", *options]
    ps = Task("ps", [*common, "--job", "ps"])
    workers = [
        Task(name, [*common, "--task", str(task)]) for task, name in enumerate(["chief", "worker 1", "worker 2"])
    ]
    try:
        for task, share in ((workers[1], 0.2), (workers[0], 0.4), (ps, 0.6)):
            wait_until(lambda share=share: newest_step(logdir) >= share * steps)
            task.kill_and_restart()
        wait_until(lambda: all(worker.process.poll() is not None for worker in workers))
    finally:
        # Parameter servers serve until they are told to stop.
        for task in (ps, *workers):
            task.kill()
    failed = [worker.name for worker in workers if worker.process.returncode != 0]
    found = [re.match(r"test accuracy ([\d.]+)%", line) for line in workers[0].lines]
    accuracy = next((float(match[1]) / 100 for match in reversed(found) if match), None)
    if failed or accuracy is None:
        sys.exit(f"DEMO FAILED: {', '.join(failed) or 'the chief'} did not end well")
    if newest_step(logdir) < steps:
        sys.exit(f"DEMO FAILED: expected the last checkpoint at step {steps} or later, found {newest_step(logdir)}")
    return accuracy


def newest_step(logdir: Path) -> int:
    return max((int(path.name.split("-")[1].split(".")[0]) for path in logdir.glob("*.manifest.json")), default=0)


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT_SECS
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"DEMO FAILED: no progress for {LIMIT_SECS:g} s")
        time.sleep(0.05)


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("localhost", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def quiet() -> dict[str, str]:
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"), "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    main()
