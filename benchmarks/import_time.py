"""Time and modules of ``import stepguard``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from common import median, print_machine, print_table

HEAVY = ("tensorflow", "keras", "torch", "jax", "flax", "orbax", "numpy", "scipy", "google", "xxhash", "asyncio")
FORBIDDEN = frozenset({"tensorflow", "keras", "torch", "jax", "flax", "orbax", "numpy", "google"})

_PROGRAM = """
import json, sys, time
before = set(sys.modules)
began = time.perf_counter()
{statement}
print(json.dumps([time.perf_counter() - began, sorted(set(sys.modules) - before)]))
"""


def measure(statement: str) -> tuple[float, list[str]]:
    """Seconds that ``statement`` takes in a fresh interpreter, and the modules that it loads."""
    program = _PROGRAM.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--breakdown", type=int, metavar="N", help="also the N slowest modules (-X importtime)")
    options = parser.parse_args()
    print_machine()
    # What any typed library of this size loads from the standard library: the floor to compare with.
    statements = {
        "import stepguard": "import stepguard",
        "all of its names": "from stepguard import *",
        "logging, threading, pathlib, dataclasses, typing": "import logging, threading, pathlib, dataclasses, typing",
    }
    found: dict[str, list[tuple[float, list[str]]]] = {name: [] for name in statements}
    for _ in range(options.rounds):
        for name, statement in statements.items():
            found[name].append(measure(statement))
    print(f"Fresh interpreters, medians of {options.rounds}. Reach: under 50 ms, no framework, no NumPy\n")
    print_table(
        ["", "ms", "fastest", "slowest", "modules loaded", "of these stepguard's"],
        [
            [
                name,
                1e3 * median([seconds for seconds, _ in ones]),
                1e3 * min(seconds for seconds, _ in ones),
                1e3 * max(seconds for seconds, _ in ones),
                len(ones[0][1]),
                sum(module.split(".")[0] == "stepguard" for module in ones[0][1]),
            ]
            for name, ones in found.items()
        ],
    )
    loaded = {module.split(".")[0] for module in found["all of its names"][0][1]}
    print(f"Heavy packages among them: {', '.join(sorted(loaded & set(HEAVY))) or 'none'}")
    if options.breakdown:
        print_breakdown(options.breakdown)
    wrong = sorted(loaded & FORBIDDEN)
    if wrong:
        sys.exit(f"import stepguard: expected no framework and no NumPy, found {', '.join(wrong)}")


def print_breakdown(count: int) -> None:
    """The modules that take longest by themselves."""
    command = [sys.executable, "-X", "importtime", "-c", "from stepguard import *"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    rows = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    times = [(int(own), int(total), name.rstrip()) for own, total, name in rows if own.strip().isdigit()]
    # What the interpreter loads before the program begins comes first; ours is all that follows `site`.
    names = [name.strip() for _, _, name in times]
    times = times[names.index("site") + 1 :]
    print()
    print_table(
        ["module", "microseconds of its own", "with what it imports"],
        [[name.strip(), own, total] for own, total, name in sorted(times, reverse=True)[:count]],
    )


if __name__ == "__main__":
    main()
