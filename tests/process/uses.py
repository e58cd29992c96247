"""Each use of the Supervisor, killed, resumed, stopped and run to its end, on both classes.

python tests/process/uses.py             prints the whole table, as docs/compared.md has it
python tests/process/uses.py "queue"     the uses with one of these words in their name
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

import tensorflow as tf
from children_uses import STEPS, USES
from zygote import SOON_SECS, Zygote, wait_until

SIDES = ("tensorflow", "stepguard")
# A signal comes when so many steps were done: the first checkpoint is there, and the last steps are not in it.
SIGNAL_AT = 40


@dataclass(frozen=True)
class Run:
    """What became of a process: its exit status, the steps that it began at and came to, and the last one on disk.

    ``secs`` are those that it took, or, where there was a signal, those from that on.
    """

    status: int
    began: int
    done: int
    on_disk: int
    secs: float


@dataclass(frozen=True)
class Record:
    """One use on one class: to its end, ended by SIGTERM, killed, and resumed after that, to its end."""

    end: Run
    sigterm: Run
    killed: Run
    resumed: Run


def on_disk(logdir: Path) -> int:
    """The steps that the newest checkpoint holds; 0 without one."""
    newest = tf.train.latest_checkpoint(str(logdir))
    return int(tf.train.load_checkpoint(newest).get_tensor("done")) if newest else 0


def has_saved(logdir: Path) -> bool:
    try:
        return on_disk(logdir) > 0
    except tf.errors.OpError:
        return False  # One takes the place of another just now.


def run(zygote: Zygote, use: str, side: str, logdir: Path, signal: int | None = None) -> Run:
    """One process, with a signal at step ``SIGNAL_AT`` if there is one."""
    since = time.monotonic()
    go_on = logdir.with_suffix(".go-on")
    hold_until = None if signal is None else str(go_on)
    child = zygote.start("use", name=use, side=side, logdir=str(logdir), hold_until=hold_until)
    if signal is not None:
        child.wait_for("step", count=SIGNAL_AT)
        # Its timer has saved before, unless the disk is slow; it does so while it waits, too.
        wait_until(lambda: has_saved(logdir), "a checkpoint")
        since = time.monotonic()
        child.send(signal)
        go_on.touch()
    status = child.wait(2 * SOON_SECS)
    secs = time.monotonic() - since
    seen = [one["done"] for one in child.reports() if one["kind"] in ("began", "step")]
    return Run(status, began=seen[0], done=max(seen), on_disk=on_disk(logdir), secs=secs)


def compare(zygote: Zygote, use: str, place: Path, *, with_end: bool = True) -> dict[str, Record]:
    """The records of both classes; without ``with_end`` the resumed run stands for one to its end."""
    found = {}
    for side in SIDES:
        folder = place / side
        killed = run(zygote, use, side, folder / "killed", SIGKILL)
        resumed = run(zygote, use, side, folder / "killed")
        found[side] = Record(
            end=run(zygote, use, side, folder / "end") if with_end else resumed,
            sigterm=run(zygote, use, side, folder / "sigterm", SIGTERM),
            killed=killed,
            resumed=resumed,
        )
    return found


def line(use: str, records: dict[str, Record]) -> str:
    """A row of the table: TensorFlow's class / ours in each cell."""

    def cell(part: str) -> str:
        both = [getattr(records[side], part) for side in SIDES]
        return " / ".join(f"{one.status}, {one.on_disk} of {one.done}, {one.secs:.1f} s" for one in both)

    began = " / ".join(str(records[side].resumed.began) for side in SIDES)
    cells = [use, cell("end"), cell("sigterm"), cell("killed"), began, cell("resumed")]
    return f"| {' | '.join(cells)} |"


def main(words: list[str]) -> None:
    """Print the table."""
    heads = ["use", f"to step {STEPS}", f"SIGTERM at {SIGNAL_AT}", f"SIGKILL at {SIGNAL_AT}", "resumes at", "resumed"]
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        zygote = Zygote(place, "children_uses")
        try:
            for number, use in enumerate(USES):
                if not words or any(word in use for word in words):
                    print(line(use, compare(zygote, use, place / f"use{number}")), flush=True)
        finally:
            zygote.close()


if __name__ == "__main__":
    main(sys.argv[1:])
