"""Starts a program in several processes of ``jax.distributed`` on this machine, as a scheduler does on several.

    python tests/jax/jax_launch.py --processes=2 tests/jax/jax_distributed.py --logdir=/tmp/run --steps=60

The program gets --processes, --rank and --port. Signals are passed on. If one process fails, the others are ended.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time


def main() -> int:
    """The exit code is that of a process that failed, as a shell reports it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [sys.executable, *given.command, f"--processes={given.processes}", f"--port={port}"]
    started = [subprocess.Popen([*common, f"--rank={rank}"]) for rank in range(given.processes)]

    def pass_on(number: int, _frame: object) -> None:
        for one in started:
            one.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    # Ctrl-C is for all processes of the terminal already.
    signal.signal(signal.SIGINT, lambda *_: None)
    while None in (codes := [one.poll() for one in started]) and not any(codes):
        time.sleep(0.02)
    failed = next((code for code in codes if code), 0)
    for one in started:
        try:
            # Those that the signal has reached too come to their own end.
            one.wait(10 if failed else None)
        except subprocess.TimeoutExpired:
            one.kill()
    return 128 - failed if failed < 0 else failed


if __name__ == "__main__":
    sys.exit(main())
