"""Starts on ext4 images in which bits of the metadata are flipped: none may die, and none load a wrong value.

    python tests/soak/inodes.py --rounds 100

Each round trains on an image that is mounted, flips one bit in the inode of one file of the logdir or in a block of one
of its directories while nothing is mounted, and starts again. ext4 with ``metadata_csum`` then answers EBADMSG. The
step, the values and what each command says are compared, as in ``unreadable.py``. It needs root, loop devices, and
``mke2fs`` and ``debugfs``.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import unreadable

MEGABYTES = 32
# Of an inode the first 128 bytes, in which are its mode, size, times and extents.
INODE_BYTES = 128
DIRECTORIES = ("model.ckpt-4", "model.ckpt-6", "heartbeats", "quarantine")


def call(*command: str | Path) -> str:
    """What a command prints. Raises CalledProcessError."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def can_mount(folder: Path) -> str | None:
    """Why no image can be mounted here; ``None`` if one can."""
    missing = [one for one in ("mke2fs", "debugfs", "mount") if shutil.which(one) is None]
    if missing:
        return f"{', '.join(missing)}: not installed"
    image = made(folder)
    try:
        with mounted(image, folder / "probe"):
            return None
    except subprocess.CalledProcessError as error:
        return str(error.stderr).strip()
    finally:
        image.unlink()


def made(folder: Path) -> Path:
    """A new file system in a file."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(MEGABYTES << 20)
    call("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", "metadata_csum", image)
    return image


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """A block in which the image is mounted at ``place``."""
    place.mkdir(exist_ok=True)
    call("mount", "-o", "loop,errors=continue", image, place)
    try:
        yield
    finally:
        call("umount", place)


def inode_at(image: Path, name: str) -> int:
    """The place of the inode of a file in the image, in bytes."""
    told = call("debugfs", "-R", f'imap "/run/{name}"', image)
    match = re.search(r"located at block (\d+), offset 0x([0-9a-f]+)", told)
    assert match is not None, told
    return int(match.group(1)) * 1024 + int(match.group(2), 16)


def block_at(image: Path, name: str) -> int | None:
    """The place of the first block of a file or a directory; ``None`` if it has none of its own."""
    told = call("debugfs", "-R", f'blocks "/run/{name}"', image).split()
    return int(told[0]) * 1024 if told and told[0] != "0" else None


def flip(image: Path, name: str, chance: random.Random) -> str | None:
    """Flip one bit of the metadata of a file of the logdir. Returns what was flipped; ``None`` if there is no file."""
    try:
        places = [(inode_at(image, name), INODE_BYTES, "inode")]
    except AssertionError:
        return None
    if name in DIRECTORIES and (block := block_at(image, name)) is not None:
        places.append((block, 1024, "block"))
    begin, size, what = chance.choice(places)
    place = begin + chance.randrange(size)
    with image.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return f"a bit of the {what} of {name}, {place - begin} bytes in"


def attack(folder: Path, name: str, chance: random.Random) -> str | None:
    """What went wrong in one round, or ``None``."""
    image, place = made(folder), folder / "mounted"
    logdir = place / "run"
    with mounted(image, place):
        first = unreadable.run(["-c", unreadable.TRAINING, str(logdir), "6"], {})
        if first.returncode:
            return f"the first start failed: {first.stderr}"
        (logdir / "quarantine").mkdir(exist_ok=True)
        steps = unreadable.saved_steps(logdir)
    flipped = flip(image, name, chance)
    if flipped is None:
        return None  # That save was skipped.
    with mounted(image, place):
        wrong = unreadable.start_again(logdir, name, steps, {})
    return None if wrong is None else f"{flipped}: {wrong}"


def main() -> None:
    """Attack until the rounds are done; ends with 1 if something went wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    chance = random.Random(given.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        if (reason := can_mount(Path(folder))) is not None:
            sys.exit(f"no ext4 image can be mounted here: {reason}")
        for number in range(given.rounds):
            wrong = attack(Path(folder), chance.choice(unreadable.FILES), chance)
            if wrong is not None:
                failed += 1
                print(f"round {number}: {wrong}", flush=True)
    print(f"{given.rounds} rounds, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
