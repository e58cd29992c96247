"""All benchmarks, one after the other: about a quarter of an hour. What is asked for by name runs alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("import_time", "step_overhead", "idle_services", "checkpointing")


def main() -> None:
    asked = sys.argv[1:] or list(BENCHMARKS)
    for name in asked:
        if name not in BENCHMARKS:
            sys.exit(f"run.py: expected one of {', '.join(BENCHMARKS)}, found {name}")
    for name in asked:
        print(f"## {name}\n", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py"))], check=True)


if __name__ == "__main__":
    main()
