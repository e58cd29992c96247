"""Starts on logdirs in which the system refuses one file: none may die, and none load a wrong value.

    python tests/soak/unreadable.py --rounds 500

Each round trains, makes the calls on one file of the logdir fail with one error, starts again, and looks at the step,
the values and what each command says. It needs gcc.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ERRNOS = ("EIO", "EBADMSG", "EUCLEAN", "ESTALE", "ELOOP", "EACCES", "EPERM", "ENXIO")
COMMANDS = (["ls"], ["verify"], ["status"], ["prune", "--keep-last", "9", "--dry-run"])
FILES = (
    *("checkpoint", "run.jsonl", "heartbeats", "heartbeats/chief.json", "quarantine", ".stepguard.lock"),
    *(f"model.ckpt-{step}{part}" for step in (4, 6) for part in ("", "/state.json", ".manifest.json")),
)

TRAINING = """
import json, sys
from stepguard.options import Saving
from stepguard.testing import FakeSupervisor
sv = FakeSupervisor(sys.argv[1], size=4, save_model_secs=0, save_model_steps=2, saving=Saving(save_at_end=True))
with sv.managed_session() as session:
    began = session.step
    assert session.values == [began] * 4, (began, session.values)
    for _ in range(int(sys.argv[2])):
        session.run_step()
print(json.dumps({"began": began, "ended": session.step}))
"""


def compiled(folder: Path) -> Path:
    """The library, which `gcc` has made."""
    library = folder / "refuse.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, HERE / "refuse.c", "-ldl"], check=True)
    return library


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A process that ends in time."""
    command = [sys.executable, *arguments]
    given = {**os.environ, **environment}
    return subprocess.run(command, env=given, check=False, capture_output=True, text=True, timeout=120)


def attack(library: Path, logdir: Path, name: str, error: str, *, changes: bool) -> str | None:
    """What went wrong in one round, or ``None``."""
    first = run(["-c", TRAINING, str(logdir), "6"], {})
    if first.returncode:
        return f"the first start failed: {first.stderr}"
    (logdir / "quarantine").mkdir(exist_ok=True)
    refusing = {
        "LD_PRELOAD": str(library),
        "REFUSE_PATH": f"{logdir}/{name}",
        "REFUSE_ERRNO": str(getattr(errno, error)),
    }
    refusing |= {"REFUSE_CHANGES": "1"} if changes else {}
    return start_again(logdir, name, saved_steps(logdir), refusing)


def saved_steps(logdir: Path) -> list[int]:
    """The steps that were saved. A save that falls due while the last is being written is skipped."""
    return sorted(int(one.name.split("-")[1].split(".")[0]) for one in logdir.glob("model.ckpt-*.manifest.json"))


def start_again(logdir: Path, name: str, steps: list[int], environment: dict[str, str]) -> str | None:
    """What went wrong with the commands, or with a start, now that ``name`` cannot be read; ``None`` if nothing did."""
    for command in COMMANDS:
        told = run(["-m", "stepguard", command[0], str(logdir), *command[1:]], environment)
        if "Traceback" in told.stderr or told.returncode not in (0, 1, 3):
            return f"{command}: exit code {told.returncode}: {told.stderr}"
    second = run(["-c", TRAINING, str(logdir), "5"], environment)
    if name == ".stepguard.lock":
        # Another process may be the chief, for all that can be known.
        return None if "stepguard.lock" in second.stderr else f"the lock: {second.stderr}"
    if second.returncode:
        return f"the start failed: {second.stderr}"
    newest = f"model.ckpt-{steps[-1]}"
    # Of a directory that the library refuses, only the calls on itself are: what lies in it can be read.
    is_refused_directory = bool(environment) and name == newest
    is_damaged = name.startswith(newest) and not is_refused_directory
    expected = steps[-2 if is_damaged else -1]
    said = json.loads(second.stdout)
    if said != {"began": expected, "ended": expected + 5}:
        return f"expected a start from {expected}, found {said}"
    if is_damaged and newest not in second.stderr:
        return f"the damage was not named: {second.stderr}"
    return None


def main() -> None:
    """Attack until the rounds are done; ends with 1 if something went wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    chance = random.Random(given.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        for number in range(given.rounds):
            name, error, changes = chance.choice(FILES), chance.choice(ERRNOS), chance.random() < 0.5
            logdir = Path(folder) / str(number)
            wrong = attack(library, logdir, name, error, changes=changes)
            if wrong is not None:
                failed += 1
                print(f"round {number}: {name} {error} {'all calls' if changes else 'reading'}: {wrong}")
            shutil.rmtree(logdir, ignore_errors=True)
    print(f"{given.rounds} rounds, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
