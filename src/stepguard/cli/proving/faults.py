"""The faults that a run is put through: what each does to the running program, and when.

All faults come from outside the program, as they do in life. When they come is drawn from the seed: the step after
which, and the moment within that step. A fault is a plain value, so that the same seed gives the same faults.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stepguard.cli.launcher.processes import send
from stepguard.cli.logdir.contents import GOOD, list_contents
from stepguard.cli.proving.full_disk import FullDisk
from stepguard.cli.proving.program import Live, Running
from stepguard.store import tensorflow_files
from stepguard.store.layout import STAGE
from stepguard.watching import heartbeat, history

KINDS = ("kill", "save", "sigterm", "interrupt", "damage", "disk", "process")
"""The names of the faults, as ``--faults`` takes them."""

# How long a save is waited for, when one is to be cut short.
_SAVE_SECS = 10.0
_LONGEST_FULL_SECS = 3.0
_SHORTEST_FULL_SECS = 0.5
# The first steps may come before the first checkpoint: a part of the run is left to them.
_FIRST_SHARE = 0.15
# The last steps may be over before a fault is felt.
_LAST_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Pace:
    """What the undisturbed run tells: its steps, the seconds of a step and of writing a checkpoint, its processes."""

    first_step: int
    last_step: int
    step_secs: float
    write_secs: float
    processes: int = 1

    @property
    def steps(self) -> int:
        """The number of its steps."""
        return max(1, self.last_step - self.first_step)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: its kind, the step after which it comes, and how much later, in seconds.

    ``choice``, from 0 to 1, chooses the process that is killed, or the bit that is flipped.
    """

    kind: str
    after_step: int
    delay_secs: float
    choice: float
    lasts_secs: float = 0.0


@dataclass(frozen=True, slots=True)
class Rung:
    """The faults of one run, one after the other."""

    kind: str
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """What a fault has done: ``is_done`` is false if the program ended before. ``text`` says more, for the verdict."""

    is_done: bool
    text: str = ""
    # Whether the program goes on, so that no restart follows.
    goes_on: bool = False
    # Whether it was done at another moment than its kind says.
    is_other: bool = False


def plan(kinds: Sequence[str], pace: Pace, seed: int) -> list[Rung]:
    """The rungs of the ladder for these kinds, in the order of :data:`KINDS`."""
    kills = [kind for kind, count in (("kill", 3), ("save", 2)) for _ in range(count) if kind in kinds]
    groups = [("kill", kills)] if kills else []
    groups += [(kind, [kind]) for kind in KINDS if kind in kinds and kind not in ("kill", "save")]
    return [
        Rung(name, _drawn(group, pace, random.Random(f"{seed} {name}")))
        for name, group in groups
        if name != "process" or pace.processes > 1
    ]


def _drawn(kinds: Sequence[str], pace: Pace, chance: random.Random) -> tuple[Fault, ...]:
    first = pace.first_step + max(1, int(_FIRST_SHARE * pace.steps))
    last = pace.first_step + int(_LAST_SHARE * pace.steps)
    steps = sorted(chance.randrange(first, max(first + 1, last)) for _ in kinds)
    # Which of the kills come during a save is drawn as well.
    shuffled = chance.sample(kinds, len(kinds))
    return tuple(_fault(kind, step, pace, chance) for kind, step in zip(shuffled, steps, strict=True))


def _fault(kind: str, step: int, pace: Pace, chance: random.Random) -> Fault:
    longest = pace.write_secs if kind == "save" else pace.step_secs
    lasts = min(_LONGEST_FULL_SECS, max(_SHORTEST_FULL_SECS, 0.3 * pace.steps * pace.step_secs))
    if kind == "disk":
        # Early, so that training goes on for a while afterwards.
        step = pace.first_step + max(1, (step - pace.first_step) // 2)
    return Fault(kind, step, chance.uniform(0, longest), chance.random(), lasts if kind == "disk" else 0.0)


def inject(fault: Fault, running: Running, live: Live) -> Done:
    """Wait for the fault's moment, and do it.

    Raises:
        OutOfTimeError: the time of the proof is over.
    """
    if not running.wait_for(lambda: (live.step() or 0) >= fault.after_step):
        return Done(False, "the program had ended before")
    match fault.kind:
        case "kill":
            time.sleep(fault.delay_secs)
            running.kill()
        case "save":
            return _kill_in_save(fault, running, live)
        case "sigterm":
            time.sleep(fault.delay_secs)
            running.ask()
        case "interrupt":
            time.sleep(fault.delay_secs)
            running.interrupt()
        case "damage":
            return _damage(fault, running, live)
        case "disk":
            return _fill_disk(fault, running, live)
        case "process":
            return _kill_one(fault, live)
    return Done(True)


def _kill_in_save(fault: Fault, running: Running, live: Live) -> Done:
    """Kill it a moment after a save has begun: its stage is there until the checkpoint is committed."""
    deadline = time.monotonic() + _SAVE_SECS
    running.wait_for(lambda: is_saving(live.logdir) or time.monotonic() > deadline)
    time.sleep(fault.delay_secs)
    running.kill()
    if is_saving(live.logdir):
        return Done(True, "in a save")
    return Done(True, "the kill came when no save was under way", is_other=True)


def is_saving(logdir: Path) -> bool:
    """Whether a checkpoint is being written there, or a kill has cut a save short."""
    try:
        return any(name.startswith(STAGE) for name in os.listdir(logdir))
    except OSError:
        return False


def _damage(fault: Fault, running: Running, live: Live) -> Done:
    """Kill it as soon as there are two good checkpoints, and flip one bit of the newest."""

    def has_two() -> bool:
        return len([one for one in list_contents(live.logdir).found if one.state == GOOD]) >= 2

    if not running.wait_for(has_two):
        return Done(False, "there were no two checkpoints")
    running.kill()
    if running.wait(lambda: None) != -signal.SIGKILL:
        # What it has saved last is the end of a run that is over: nothing would be restored from what is before it.
        return Done(False, "the program had ended before")
    file = damage_newest(live.logdir, fault.choice)
    return Done(file is not None, "" if file is None else f"one bit of {file} flipped")


def damage_newest(logdir: Path, choice: float) -> str | None:
    """Flip one bit of the largest file of the newest good checkpoint. Returns its name; ``None`` if there is none."""
    newest = next((one for one in list_contents(logdir).found if one.state == GOOD), None)
    if newest is None or newest.checkpoint.manifest is None:
        return None
    # The meta graph of TensorFlow is not read by a restore, which may then rightly take this checkpoint.
    name = newest.checkpoint.name
    data = [one for one in newest.checkpoint.manifest.files if tensorflow_files.is_needed(one.name, name)]
    largest = max(data, key=lambda one: one.size)
    with (newest.checkpoint.root / largest.name).open("r+b") as file:
        file.seek(int(choice * largest.size))
        byte = file.read(1)[0]
        file.seek(int(choice * largest.size))
        file.write(bytes([byte ^ 1 << int(choice * 8e6) % 8]))
        os.fsync(file.fileno())
    return str(largest.name)


def _fill_disk(fault: Fault, running: Running, live: Live) -> Done:
    """Let the processes that train write nothing to any file for a while."""
    ours = running.descendants()
    disk = FullDisk(one.pid for one in heartbeat.read(live.logdir) if one.pid in ours)
    ends = time.monotonic() + fault.lasts_secs

    def is_over() -> bool:
        disk.spare(running.descendants())
        return time.monotonic() >= ends

    try:
        goes_on = running.wait_for(is_over)
    finally:
        disk.end(running.descendants())
    if not disk.is_full:
        return Done(False, "only Linux limits the files of another process", goes_on=True)
    return Done(goes_on, "" if goes_on else "the program ended while the disk was full", goes_on=True)


def _kill_one(fault: Fault, live: Live) -> Done:
    """Kill one of several processes that train together."""
    time.sleep(fault.delay_secs)
    beats = [one for one in heartbeat.read(live.logdir) if heartbeat.state(one) in ("alive", "silent")]
    beats.sort(key=lambda one: (one.role == history.CHIEF, one.role))
    if len(beats) < 2:
        return Done(False, "there was one process only")
    victim = beats[int(fault.choice * len(beats))]
    send(victim.pid, signal.SIGKILL)
    return Done(True, victim.role)
