"""All benchmarks, one after the other; what is asked for by name runs alone.

With ``--out`` the figures also go into a Markdown file, each with the command that made it, and all with the commit;
with ``--json`` their tables go into a JSON file, for ``docs/figures.py``.
``--smallest`` shows in a minute or two that all of them run, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Each benchmark, and the arguments of its smallest size.
SMALLEST = {
    "import_time": "--rounds 1",
    "step_overhead": "--rounds 1 --turns 1 --steps 5",
    "step_trace": "--rounds 1 --turns 1 --steps 5 --batch-bytes 1000",
    "idle_services": "--rounds 1 --secs 1 --service-secs 0.2 --settle-secs 0.3",
    "checkpointing": "--mb 10 --rounds 1 --secs 1 --save-secs 0.2 --step-ms 5 --repeats 1",
    "replicas": "--secs 0.5 --repeat 1 --waited-secs 0.2 --recovery-wait-secs 1",
    "rendezvous": "--processes 2 --saves 2 --idle-secs 0.5 --step-secs 0.02 --hosts 1",
    "large_logdirs": "--checkpoints 3 --processes 1 2 --repeats 1",
    "torch_stalls": "--megabytes 4 --seconds 1",
    "overhead": "--megabytes 4 --secs 2 --settle-secs 1 --rounds 1 --step-secs 0.005 --min-secs 0.2",
    "torch_checkpoints": "--megabytes 4 --seconds 0.5 --rounds 1 --repeats 1 --steps 200 --step-secs 0.005",
    "jax_checkpoints": "--megabytes 2 --arrays 3 --rounds 1",
    "jax_stalls": "--megabytes 2 --seconds 0.3 --overhead-steps 200",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(SMALLEST)}; by default all")
    parser.add_argument("--smallest", action="store_true", help="the smallest size of each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there, with commands and commit")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(SMALLEST))
    if unknown:
        parser.error(f"expected names among {', '.join(SMALLEST)}, found {', '.join(unknown)}")
    parts = [f"Commit {commit()}.\n"]
    for name in given.names or SMALLEST:
        arguments = shlex.split(SMALLEST[name]) if given.smallest else []
        parts.append(measured(name, arguments))
    if given.out is not None:
        given.out.write_text("\n".join(parts))
    if given.json is not None:
        given.json.write_text(json.dumps(as_json(parts[1:]), indent=1) + "\n")


def as_json(parts: list[str]) -> dict[str, Any]:
    """What :func:`measured` has returned, and the tables in it, by the name of the benchmark; cells are strings."""
    about = f"Commit {commit()}, {datetime.now(timezone.utc):%Y-%m-%d}, Python {platform.python_version()}"
    benchmarks = {}
    for part in parts:
        heading, _, command, *lines = part.splitlines()
        benchmarks[heading.removeprefix("## ")] = {
            "command": command.strip("`"),
            "tables": tables(lines),
            "output": "\n".join(lines).strip(),
        }
    return {"about": about, "benchmarks": benchmarks}


def tables(lines: list[str]) -> list[dict[str, Any]]:
    """The Markdown tables among ``lines``. The first column of the measured classes often has no name: ``class``."""
    found: list[dict[str, Any]] = []
    was_table = False
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            was_table = False
        elif not was_table:
            was_table = True
            found.append({"columns": [cell or "class" for cell in cells], "rows": []})
        elif not set(line) <= set("|-: "):
            found[-1]["rows"].append(cells)
    return found


def measured(name: str, arguments: list[str]) -> str:
    """Run one benchmark, show what it prints, and return that with the command."""
    head = f"## {name}\n\n`{shlex.join(['python', f'benchmarks/{name}.py', *arguments])}`\n"
    print(head, flush=True)
    lines = [head]
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if process.returncode != 0:
        sys.exit(f"{name}: ended with {process.returncode}")
    return "\n".join(lines) + "\n"


def commit() -> str:
    """What is measured: the commit, and whether anything was changed since; unknown outside a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
