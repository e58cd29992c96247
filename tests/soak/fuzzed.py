"""Logdirs that are damaged at random, by the thousand: every start takes a checkpoint that is right, or refuses.

    python tests/soak/fuzzed.py --rounds 2000

Each round damages one to four files of a logdir: it flips bits, cuts, mixes, removes, replaces them by what is no file,
or changes one field of a record and gives the record the digest that it should then have. Then the commands run, and a
start trains two steps. It is a failure if a start takes an older checkpoint than the newest that was not touched, a
value that does not equal the step, or does not end; and if a command ends in any other way than with an exit code of
its own. All of this happens in one process, on the fake engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from stepguard.cli.main import cli
from stepguard.disk import files
from stepguard.errors import CheckpointMismatchError, NoGoodCheckpointError
from stepguard.options import Saving
from stepguard.testing import FakeSupervisor

SIZE = 4
STEPS = (2, 4, 6)
SOON_SECS = 30
COMMANDS = (["ls"], ["verify"], ["status"], ["prune", "--keep-last", "2", "--dry-run"], ["ls", "--json"])
# What may stand in a record in place of what does.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        5,
        2**63,
        10**400,
        1.5,
        1e300,
        "",
        "5",
        "../x",
        "/etc/passwd",
        "\x1b[2J",
        "a\nb",
        "x" * 70_000,
    ),
    *([], {}, [None], {"a": []}, ["model.ckpt-4"], "model.ckpt-4/state.json", "model.ckpt-\u00b2", "\ud800"),
)


class LateError(Exception):
    """Something does not end."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """A block that raises LateError if it takes too long."""

    def late(*_: object) -> None:
        raise LateError(f"not done after {SOON_SECS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SOON_SECS)
    try:
        yield
    finally:
        signal.alarm(0)


def train(logdir: Path, steps: int) -> int:
    """A run of so many steps. Returns the step at which it began, at which all values must be."""
    sv = FakeSupervisor(str(logdir), size=SIZE, save_model_secs=0, saving=Saving(save_at_end=True))
    with sv.managed_session() as session:
        began = session.step
        assert session.values == [began] * SIZE, f"began at {began} with {session.values}"
        for _ in range(steps):
            session.run_step()
    return began


# ------------------------------------------------------------------------------------------------ damage


def _is_small(path: Path) -> bool:
    return not path.is_symlink() and path.is_file() and path.stat().st_size < 1 << 30


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(chance.choice((1, 1, 1, 8))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(max(1, path.stat().st_size)))


def grow(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.choice((b"\0", b"\n", b"{}", chance.randbytes(100), b"[" * 100_000)))


def swap(path: Path, chance: random.Random) -> None:
    others = [one for one in path.parent.rglob("*") if _is_small(one) and one != path]
    if others:
        path.write_bytes(chance.choice(others).read_bytes())


def drop(path: Path, _: random.Random) -> None:
    path.unlink()


def replace(path: Path, chance: random.Random) -> None:
    path.unlink()
    kind = chance.choice(("fifo", "zeros", "loop", "directory", "socket", "huge", "outside"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "socket":
        bound = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):  # Its path may be too long.
            bound.bind(str(path))
        bound.close()
    else:
        path.symlink_to({"zeros": "/dev/zero", "loop": path, "outside": "/etc/hostname"}[kind])


def craft(path: Path, chance: random.Random) -> None:
    """Change one field of a record; a manifest gets the digest of its new content."""
    try:
        lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
        number = chance.randrange(len(lines))
        record = json.loads(lines[number])
        place = chance.choice(list(_places(record)))
    except (ValueError, IndexError):
        flip(path, chance)
        return
    holder, key = place
    holder[key] = chance.choice(VALUES)
    if "digest" in record and "files" in record:
        del record["digest"]
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")
        record["digest"] = files.digest_bytes(canonical)
    lines[number] = json.dumps(record).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


def _places(record: Any) -> Iterator[tuple[Any, Any]]:
    for key in record if isinstance(record, dict) else range(len(record)):
        yield record, key
        if isinstance(record[key], (dict, list)):
            yield from _places(record[key])


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, flip, cut, grow, swap, drop, replace, craft, craft)


def damage(logdir: Path, chance: random.Random) -> list[str]:
    """Damage some files. Returns what was done to which."""
    done = []
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        found = sorted(one for one in logdir.rglob("*") if _is_small(one) and one.name != ".stepguard.lock")
        path, how = chance.choice(found), chance.choice(DAMAGES)
        how(path, chance)
        done.append(f"{path.relative_to(logdir)} {how.__name__}")
    return done


# ------------------------------------------------------------------------------------------------ the rounds


def attack(original: Path, logdir: Path, chance: random.Random) -> tuple[str | None, list[str]]:
    """One round: what went wrong, or ``None``; and the damage."""
    shutil.rmtree(logdir, ignore_errors=True)
    shutil.copytree(original, logdir)
    done = damage(logdir, chance)
    touched = {step for step in STEPS for one in done if one.startswith((f"model.ckpt-{step}.", f"model.ckpt-{step}/"))}
    newest = max(set(STEPS) - touched, default=None)
    try:
        with in_time():
            for command in COMMANDS:
                result = CliRunner().invoke(cli, [command[0], str(logdir), *command[1:]])
                if result.exception is not None and not isinstance(result.exception, SystemExit):
                    raise result.exception
                if result.exit_code not in (0, 1, 3):
                    return f"{command}: exit code {result.exit_code}: {result.output}", done
            try:
                began = train(logdir, 2)
            except CheckpointMismatchError as error:
                # The newest says that another engine has saved it: no start goes past the work of another program.
                return (None if any(one.endswith(" craft") for one in done) else str(error)), done
            except (NoGoodCheckpointError, OSError) as error:
                return (None if newest is None else f"refused although {newest} is good: {error}"), done
            if began < (newest or 0):
                return f"began at {began}, although {newest} is good", done
            again = train(logdir, 0)
            return (None if again == began + 2 else f"saved {began + 2}, and began again at {again}"), done
    except Exception:  # noqa: BLE001 - whatever it is, it is a finding
        return traceback.format_exc(limit=-6), done


def main() -> None:
    """Attack until the rounds are done; ends with 1 if something went wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    logging.disable(logging.CRITICAL)
    failed, done = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        for _ in STEPS:
            train(original, 2)
        for number in range(given.rounds):
            chance = random.Random(f"{given.seed} {number}")
            wrong, damages = attack(original, Path(folder) / "run", chance)
            done.update(one.rpartition(" ")[2] for one in damages)
            if wrong is not None:
                failed += 1
                print(f"round {number}: {', '.join(damages)}: {wrong}", flush=True)
    print(
        f"{given.rounds} rounds, {failed} failed; damage: {', '.join(f'{n} {how}' for how, n in sorted(done.items()))}"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
