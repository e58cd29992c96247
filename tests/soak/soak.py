"""Kills, stops, full disks and damage at random, on every engine, and nothing may be lost.

    make soak                      # an hour
    make soak SOAK_SECONDS=300
    python tests/soak/soak.py --seconds 300 --engines numpy torch --seed 7

Each engine trains the model of the engine suite, in which every number equals the step, in a logdir of its own. A round
starts a real process, does one thing to it or to its logdir, and then looks at every checkpoint: its digests, and its
values. It is a loss if

- a start fails, or does not end in time, although a good checkpoint exists;
- a start begins at another step than the newest good checkpoint, or with a value that does not equal the step; a save
  whose data were complete when a kill came may be finished by the next start, which then begins there;
- a checkpoint that was committed before the process ended is not there, or not good, after it;
- a run that was asked to stop has not saved its last step.

The logdirs are on small file systems in memory, which are filled up, where such can be mounted. Beside them run the
attacks of ``unreadable.py`` and, where ext4 images can be mounted, of ``inodes.py``. At the end there is a table; the
exit code is 1 if anything was lost, and each loss names a copy of its logdir.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# TensorFlow's lines about the processor.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

TESTS = Path(__file__).resolve().parents[1]
for _room in ("engines", "process", "soak"):
    sys.path.insert(0, str(TESTS / _room))

import inodes  # noqa: E402
import unreadable  # noqa: E402
from mounts import Mount  # noqa: E402
from soak_child import PROGRAMS, SIZE, engine_under_test  # noqa: E402
from zygote import Child, Zygote  # noqa: E402

from stepguard.errors import CheckpointError, LogdirInUseError  # noqa: E402
from stepguard.store import Checkpoint, CheckpointStore, leftovers, tensorflow_files  # noqa: E402
from stepguard.store.layout import Layout  # noqa: E402

PAUSE_SECS = 0.002
# Of the steps of a run that nobody interrupts.
STEPS = 60
FOR_EVER = 1_000_000

_MANIFEST = re.compile(r"model\.ckpt-(\d+)\.manifest\.json")


class LossError(Exception):
    """What must not happen."""


@dataclass
class Tally:
    """What was done and seen for one engine."""

    rounds: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    verified: int = 0
    in_use: int = 0


class Attacked:
    """One engine with its logdir, and what can be done to it."""

    weight = 4

    def __init__(
        self,
        name: str,
        zygote: Zygote,
        logdir: Path,
        mount: Mount | None,
        chance: random.Random,
        only: list[str],
        patience_secs: float,
    ) -> None:
        self.name = name
        self.logdir = logdir
        self.mount = mount
        self.tally = Tally()
        self._zygote = zygote
        self._chance = chance
        self._only = only
        self._patience_secs = patience_secs
        self._saver_files = tensorflow_files if name == "tensorflow" else None
        self._reader = engine_under_test(name)
        self._children: list[Child] = []
        # The step of the save that the newest start may finish, if a kill has left one.
        self._unfinished: int | None = None

    # --- what is there ---

    def store(self) -> CheckpointStore:
        """As the engine opens it."""
        return CheckpointStore(self.logdir, saver_files=self._saver_files)

    def good(self) -> list[int]:
        """The steps of the checkpoints that are good. Raises LossError if one holds a wrong value.

        TensorFlow's files without a manifest count as a checkpoint that its own tools have written.
        """
        found = []
        store = self.store()
        for one in store.candidates():
            try:
                proven = store.verify(one)
            except (CheckpointError, OSError):
                continue
            if proven.step is not None and (proven.is_committed or self._saver_files is not None):
                self._check_values(proven)
                found.append(proven.step)
        return sorted(found)

    def _check_values(self, proven: Checkpoint) -> None:
        values = self._reader.read(proven.path)
        self.tally.verified += 1
        if values != [proven.step] * SIZE:
            raise LossError(f"{proven.path.name} holds {values}")

    def seen(self) -> int:
        """The newest step of which there is a manifest, found without any of our code; -1 if there is none."""
        names = os.listdir(self.logdir) if self.logdir.is_dir() else []
        return max((int(match.group(1)) for one in names if (match := _MANIFEST.fullmatch(one))), default=-1)

    def unfinished(self) -> int | None:
        """The step of a save that lacks only renames, if a kill has left one: the next start may finish it."""
        name = None
        # Where there is no logdir yet, or a process that is being killed still renames.
        with suppress(OSError):
            name = leftovers.will_be_finished(Layout(self.logdir, "model.ckpt", self._saver_files))
        return None if name is None else int(name.rpartition("-")[2])

    # --- processes ---

    def start(self, steps: int = FOR_EVER, function: str = "train") -> Child:
        """Start the program."""
        self.tally.starts += 1
        self._unfinished = self.unfinished()
        child = self._zygote.start(function, logdir=str(self.logdir), steps=steps, pause_secs=PAUSE_SECS)
        self._children.append(child)
        return child

    def await_begin(self, child: Child, expected: int) -> None:
        """Wait until it trains. Raises LossError if it does not, or from another step, or with wrong values."""
        deadline = time.monotonic() + self._patience_secs
        while not child.reports("began"):
            if child.poll() is not None:
                raise LossError(f"a start failed: {child.output[-3000:]}")
            if time.monotonic() > deadline:
                child.kill()
                raise LossError(f"a start did not come to train in {self._patience_secs:g} s: {child.output[-3000:]}")
            time.sleep(0.005)
        self.check_begin(child, expected)

    def check_begin(self, child: Child, expected: int) -> None:
        """Raise LossError if the newest start began elsewhere than at ``expected``, or than at a save that it has
        finished. It may have been killed before.
        """
        for began in child.reports("began"):
            if began["step"] not in (expected, self._unfinished) or not began["is_whole"]:
                raise LossError(f"expected a start at step {expected} with its values, found {began}")

    def end(self, child: Child) -> int:
        """Wait until it has ended by itself. Raises LossError if it does not."""
        try:
            return child.wait(self._patience_secs)
        except AssertionError:
            child.kill()
            raise LossError(f"a process did not end in {self._patience_secs:g} s: {child.output[-3000:]}") from None

    def kill(self, child: Child) -> None:
        """End it at once, and look whether what was committed until then is good."""
        seen = self.seen()
        if child.poll() is None:
            child.kill()
        self.check_kept(seen)

    def check_kept(self, seen: int) -> None:
        """Raise LossError if no good checkpoint is as new as ``seen``."""
        good = self.good()
        if max(good, default=-1) < seen:
            raise LossError(f"step {seen} was committed, and the newest good ones are {good}")

    def pause(self, most_secs: float) -> None:
        """Let some time go by."""
        time.sleep(self._chance.uniform(0, most_secs))

    # --- the rounds ---

    def killed(self, newest: int) -> None:
        """SIGKILL at any moment, also during the start."""
        child = self.start()
        if self._chance.random() < 0.7:
            self.await_begin(child, newest)
        self.pause(0.6)
        self.kill(child)
        self.check_begin(child, newest)

    def killed_in_a_group(self, newest: int) -> None:
        """SIGKILL for all processes of the run at once, and a start in the same moment."""
        child = self.start(function="train_in_a_group")
        self.await_begin(child, newest)
        self.pause(0.2)
        seen = self.seen()
        os.killpg(child.pid, signal.SIGKILL)
        after = self.start(steps=STEPS)
        self.end(after)
        if LogdirInUseError.__name__ in after.output:
            self.tally.in_use += 1
        self.end(child)
        if not after.reports("began"):
            raise LossError(f"a start right after a kill failed: {after.output[-3000:]}")
        self.check_kept(seen)

    def asked_to_stop(self, newest: int) -> None:
        """SIGTERM or Ctrl-C: the last complete step is saved."""
        child = self.start()
        self.await_begin(child, newest)
        self.pause(0.6)
        child.send(self._chance.choice((signal.SIGTERM, signal.SIGINT)))
        self.end(child)
        done = max((one["step"] for one in child.reports("step")), default=newest)
        self.check_kept(done)

    def suspended(self, newest: int) -> None:
        """SIGSTOP and SIGCONT, some times, and an end of its own or by a kill."""
        child = self.start(steps=STEPS)
        for _ in range(self._chance.randrange(1, 5)):
            self.pause(0.1)
            if child.poll() is None:
                child.send(signal.SIGSTOP)
                self.pause(0.2)
                child.send(signal.SIGCONT)
        if self._chance.random() < 0.5:
            self.kill(child)
        elif (code := self.end(child)) != 0:
            raise LossError(f"a run that was suspended ended with {code}: {child.output[-3000:]}")
        self.check_begin(child, newest)

    def full_disk(self, newest: int) -> None:
        """A disk without room before the start or within the run, for a while or until a kill."""
        assert self.mount is not None
        is_before = self._chance.random() < 0.5
        filler = self.mount.fill() if is_before else None
        child = self.start()
        try:
            self.await_begin(child, newest)
            self.pause(0.3)
            if filler is None:
                filler = self.mount.fill(self._chance.choice((0, 0, 0.02, 0.1)))
            self.pause(1.0)
            if self._chance.random() < 0.3:
                self.kill(child)
                return
        finally:
            if filler is not None:
                filler.unlink(missing_ok=True)
            if child.poll() is None and not child.reports("began"):
                child.kill()
        child.send(signal.SIGTERM)
        self.end(child)
        self.check_kept(max((one["step"] for one in child.reports("step")), default=newest))

    def damaged(self, newest: int) -> None:
        """One file of the newest checkpoint, or beside the checkpoints, is another one at the next start."""
        if len(self.good()) < 2:
            self.undisturbed(newest)
            return
        what = damage(self.logdir, newest, self._chance)
        expected = max(self.good(), default=-1)
        child = self.start(steps=STEPS)
        try:
            self.await_begin(child, expected)
            self.end(child)
            self.check_kept(expected + STEPS)
        except LossError as error:
            raise LossError(f"{what}: {error}") from None

    def undisturbed(self, newest: int) -> None:
        """A run that nobody interrupts."""
        child = self.start(steps=STEPS)
        self.await_begin(child, newest)
        if (code := self.end(child)) != 0:
            raise LossError(f"ended with {code}: {child.output[-3000:]}")
        self.check_kept(newest + STEPS)

    def kinds(self) -> list[Callable[[int], None]]:
        """Each kind of round, as often as it is to be chosen."""
        found = [self.killed, self.killed, self.killed_in_a_group, self.asked_to_stop, self.suspended]
        found += [self.damaged, self.damaged, self.damaged]
        found += [] if self.mount is None else [self.full_disk, self.full_disk]
        return [one for one in found if not self._only or one.__name__ in self._only]

    def round(self) -> str | None:
        """One round. Returns what was lost, or ``None``."""
        do = self._chance.choice(self.kinds())
        self.tally.rounds[do.__name__] += 1
        try:
            do(max(self.good(), default=0))
        except LossError as error:
            self.tally.lost[do.__name__] += 1
            return f"{self.name}: {do.__name__}: {error}"
        finally:
            self._end_all()
        return None

    def _end_all(self) -> None:
        """Kill what a round that was given up has left, with its group: it would go on in the next round's logdir."""
        children, self._children = self._children, []
        for child in children:
            if child.poll() is None:
                with suppress(ProcessLookupError):
                    is_group = os.getpgid(child.pid) == child.pid
                    (os.killpg if is_group else os.kill)(child.pid, signal.SIGKILL)
                child.wait(self._patience_secs)


KINDS = ("killed", "killed_in_a_group", "asked_to_stop", "suspended", "damaged", "full_disk")


# ------------------------------------------------------------------------------------------------ damage


def _flipped(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(max(1, path.stat().st_size)))


def _grown(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 5000)))


def _garbage(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(chance.choice((0, 1, path.stat().st_size))))


def _gone(path: Path, _: random.Random) -> None:
    path.unlink()


def _fifo(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _zeros(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _loop(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def _directory(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (_flipped, _flipped, _flipped, _cut, _grown, _garbage, _gone, _fifo, _zeros, _loop, _directory)
# A lock that is none is refused with a sentence, and a directory of that name cannot be replaced.
BESIDE = ("checkpoint", "run.jsonl", "heartbeats/chief.json", "graph.pbtxt")


def damage(logdir: Path, newest: int, chance: random.Random) -> str:
    """Damage one file of the checkpoint ``newest``, or one beside the checkpoints. Returns what was done."""
    prefix = f"model.ckpt-{newest}"
    files = [path for path in logdir.rglob("*") if path.is_file() and not path.is_symlink()]
    of_newest = [one for one in files if str(one.relative_to(logdir)).startswith((f"{prefix}.", f"{prefix}/"))]
    beside = [one for one in files if str(one.relative_to(logdir)) in BESIDE or "tfevents" in one.name]
    path = chance.choice(of_newest if chance.random() < 0.7 or not beside else beside)
    how = chance.choice(DAMAGES)
    how(path, chance)
    return f"{path.relative_to(logdir)} {how.__name__}"


# ------------------------------------------------------------------------------------------------ all of it


class Refused:
    """Starts on files that the system refuses, as ``unreadable.py`` and ``inodes.py`` make them."""

    name = "fake"
    # A round starts six processes.
    weight = 1

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.tally = Tally()
        self.logdir = folder / "refused"
        self._folder = folder
        self._chance = chance
        self._library = unreadable.compiled(folder) if shutil.which("gcc") else None
        self._has_images = os.geteuid() == 0 and inodes.can_mount(folder) is None
        self.is_possible = self._has_images or self._library is not None

    def round(self) -> str | None:
        """One round. Returns what was lost, or ``None``."""
        name = self._chance.choice(unreadable.FILES)
        if self._has_images and (self._library is None or self._chance.random() < 0.5):
            kind, wrong = "flipped_metadata", inodes.attack(self._folder, name, self._chance)
        else:
            assert self._library is not None
            shutil.rmtree(self.logdir, ignore_errors=True)
            error, changes = self._chance.choice(unreadable.ERRNOS), self._chance.random() < 0.5
            kind, wrong = "refused_file", unreadable.attack(self._library, self.logdir, name, error, changes=changes)
        self.tally.rounds[kind] += 1
        self.tally.starts += 2
        self.tally.lost[kind] += wrong is not None
        return None if wrong is None else f"{kind}: {name}: {wrong}"


@contextmanager
def attacked(
    names: list[str], folder: Path, chance: random.Random, only: list[str], patience_secs: float
) -> Iterator[list[Attacked]]:
    """Each engine, with a process that forks its programs, and a file system of its own where one can be mounted."""
    with ExitStack() as stack:
        found = []
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [TESTS / "engines", TESTS / "soak", *sys.path]))
        for name in names:
            os.environ["SOAK_ENGINE"] = name
            place = folder / f"{name}-processes"
            place.mkdir()
            zygote = Zygote(place, "soak_child")
            stack.callback(zygote.close)
            mount = stack.enter_context(small_disk(folder / f"{name}-disk"))
            logdir = folder / name if mount is None else mount.path / "run"
            found.append(Attacked(name, zygote, logdir, mount, chance, only, patience_secs))
        del os.environ["SOAK_ENGINE"]
        yield found


@contextmanager
def small_disk(path: Path) -> Iterator[Mount | None]:
    """A small file system in memory; ``None`` where none can be mounted."""
    path.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=16m tmpfs '{path}' 2>/dev/null") != 0:
        yield None
        return
    mount = Mount(path)
    try:
        yield mount
    finally:
        os.system(f"umount -l '{path}'")


def soak(targets: list[Any], seconds: float, kept: Path, chance: random.Random) -> int:
    """Attack until the time is over; return the number of losses. Each leaves a copy of its logdir in ``kept``."""
    deadline, losses = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        (target,) = chance.choices(targets, [one.weight for one in targets])
        loss = target.round()
        if loss is None:
            continue
        losses += 1
        copy = kept / f"loss-{losses}"
        # Nothing special is opened by the copy.
        os.system(f"cp -a '{target.logdir}' '{copy}' 2>/dev/null")
        shutil.rmtree(target.logdir, ignore_errors=True)
        print(f"LOST: {loss}\n  {copy}", flush=True)
    return losses


def table(targets: list[Any]) -> Iterator[str]:
    """What was done and what was lost, for each engine and kind."""
    yield f"| {'engine':10} | {'round':18} | {'rounds':>7} | {'lost':>4} |"
    yield f"|{'-' * 12}|{'-' * 20}|{'-' * 9}|{'-' * 6}|"
    for one in targets:
        for kind, count in sorted(one.tally.rounds.items()):
            yield f"| {one.name:10} | {kind:18} | {count:7} | {one.tally.lost[kind]:4} |"
    rounds = sum(sum(one.tally.rounds.values()) for one in targets)
    starts, verified = (sum(getattr(one.tally, name) for one in targets) for name in ("starts", "verified"))
    in_use = sum(one.tally.in_use for one in targets)
    lost = sum(sum(one.tally.lost.values()) for one in targets)
    yield (
        f"{rounds:,} rounds, {starts:,} starts, {verified:,} checkpoints read and compared; "
        f"{in_use} refused by a dead chief; {lost} losses"
    )


def main() -> None:
    """Attack for the given time; ends with 1 if anything was lost."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=3600.0)
    options.add_argument("--engines", nargs="+", choices=sorted(PROGRAMS), default=sorted(PROGRAMS))
    options.add_argument("--only", nargs="+", choices=KINDS, default=[], help="only these rounds of the engines")
    options.add_argument("--seed", type=int, default=None)
    options.add_argument(
        "--patience-secs",
        type=float,
        default=120.0,
        help="a start or an end that takes longer is a loss; give more beside other work",
    )
    given = options.parse_args()
    # A script that starts this in its background has it ignore Ctrl-C, and so would the programs to which one is sent.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # What this process finds when it looks is in the table.
    logging.getLogger("stepguard").setLevel(logging.ERROR)
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    chance = random.Random(seed)
    print(f"{given.seconds:g} s, seed {seed}, engines {', '.join(given.engines)}", flush=True)
    kept = Path(tempfile.mkdtemp(prefix="stepguard-soak-"))
    with (
        tempfile.TemporaryDirectory(prefix="stepguard-soak-") as folder,
        attacked(given.engines, Path(folder), chance, given.only, given.patience_secs) as engines,
    ):
        targets: list[Any] = list(engines)
        refused = Refused(Path(folder), chance)
        targets += [refused] if refused.is_possible and not given.only else []
        losses = soak(targets, given.seconds, kept, chance)
        print("\n".join(table(targets)))
    if not losses:
        kept.rmdir()
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
