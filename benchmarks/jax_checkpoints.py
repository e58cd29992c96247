"""Checkpoints of a JAX program on the disk: written durably, restored, and damaged; ours and Orbax's.

All in one run and in turns, so that the ratios mean something on a busy machine too::

    python benchmarks/jax_checkpoints.py --megabytes=200 --rounds=5
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from common import print_table

from stepguard import Saving
from stepguard.jax import Supervisor
from stepguard.store import CheckpointStore

AT_THE_END = Saving(save_at_end=True)
PLAIN = "a plain write and fsync of the same bytes"
ORBAX = "Orbax"
ORBAX_PLAIN = "Orbax, without OCDBT and compression"
ORBAX_UNCOMPRESSED = "Orbax, without compression"
OPTIONS: dict[str, dict[str, bool]] = {
    ORBAX: {},
    ORBAX_UNCOMPRESSED: {"use_compression": False},
    ORBAX_PLAIN: {"use_ocdbt": False, "use_compression": False},
}
BLOCK_BYTES = 1 << 20


def state_of(megabytes: int, arrays: int) -> dict[str, jax.Array]:
    """Random numbers in a number of arrays."""
    size = max(1, megabytes * 1_000_000 // 4 // arrays)
    numbers = np.random.default_rng(0)
    return {f"w{n}": jnp.asarray(numbers.standard_normal(size, dtype=np.float32)) for n in range(arrays)}


def synced(place: Path) -> None:
    """Make what another program has written durable."""
    for directory, _, names in os.walk(place):
        for path in [*(Path(directory, name) for name in names), Path(directory)]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def write_plain(state: dict[str, jax.Array], place: Path) -> float:
    place.mkdir()
    began = time.perf_counter()
    with open(place / "plain", "wb", buffering=0) as file:
        for array in state.values():
            view = memoryview(np.asarray(array).view(np.uint8))
            for begin in range(0, len(view), BLOCK_BYTES):
                file.write(view[begin : begin + BLOCK_BYTES])
        os.fsync(file.fileno())
    return time.perf_counter() - began


def write_ours(state: dict[str, jax.Array], place: Path) -> float:
    """From the snapshot to the commit, as it is logged."""
    saves: list[float] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("saved step") and isinstance(record.args, tuple):
                saves.append(float(record.args[-1]))  # type: ignore[arg-type]

    logger, handler = logging.getLogger("stepguard"), Handler()
    logger.addHandler(handler)
    try:
        train(state, place)
    finally:
        logger.removeHandler(handler)
    return saves[-1]


def train(state: dict[str, jax.Array], place: Path, steps: int = 1) -> Any:
    """A run that ends at the step ``steps``, without changing the state."""
    sv = Supervisor(place, save_model_secs=0, saving=AT_THE_END, save_summaries_secs=0)
    with sv.managed_session(state) as session:
        for _ in session.steps(max_steps=steps):
            session.state = dict(session.state)


def orbax(name: str) -> Any:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**OPTIONS[name]))


def write_orbax(name: str) -> Callable[[dict[str, jax.Array], Path], float]:
    def write(state: dict[str, jax.Array], place: Path) -> float:
        with contextlib.closing(orbax(name)) as checkpointer:
            began = time.perf_counter()
            checkpointer.save(place, args=ocp.args.PyTreeSave(state))
            synced(place)
            return time.perf_counter() - began

    return write


def write_secs(state: dict[str, jax.Array], folder: Path, turn: int) -> dict[str, float]:
    """From a state in memory to the moment at which no crash can lose it, for each way of writing it."""
    ways = {PLAIN: write_plain, "stepguard": write_ours, **{name: write_orbax(name) for name in OPTIONS}}
    first, taken = turn % len(ways), {}
    for name in [*list(ways)[first:], *list(ways)[:first]]:
        taken[name] = ways[name](state, folder / "written")
        shutil.rmtree(folder / "written")
    return taken


def restore_secs(state: dict[str, jax.Array], folder: Path) -> dict[str, float]:
    """From files to arrays in the form of the program's: ours with every byte verified, Orbax's without."""
    train(state, folder / "ours")
    path = CheckpointStore(folder / "ours", engine="jax").candidates()[0].path
    zeros = jax.tree.map(jnp.zeros_like, state)
    sv = Supervisor(folder / "ours", save_model_secs=0, save_summaries_secs=0)
    taken = {}
    began = time.perf_counter()
    with sv.managed_session(zeros) as session:
        jax.block_until_ready(session.state)
        taken["stepguard, verified"] = time.perf_counter() - began
    places = {f"{ORBAX}, from our files": path}
    for name in OPTIONS:
        places[name] = folder / name
        with contextlib.closing(orbax(name)) as checkpointer:
            checkpointer.save(folder / name, args=ocp.args.PyTreeSave(state))
    for name, place in places.items():
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
            began = time.perf_counter()
            jax.block_until_ready(checkpointer.restore(place, target=zeros))
            taken[name] = time.perf_counter() - began
    for place in folder.iterdir():
        shutil.rmtree(place)
    return taken


def damaged(folder: Path) -> dict[str, dict[str, str]]:
    """What a start does after a flipped byte in the newest checkpoint, and after its largest file was cut in half."""
    return {
        name: {kind: outcome(folder / f"{name} {kind}", kind) for kind in ("flipped byte", "cut in half")}
        for name, outcome in {"stepguard": damaged_ours, "Orbax CheckpointManager": damaged_orbax}.items()
    }


def damage(newest: Path, kind: str) -> None:
    path = max((one for one in newest.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if kind == "flipped byte" else content[: len(content) // 2])


def damaged_ours(place: Path, kind: str) -> str:
    for steps in (1, 2):
        train(state_of(1, 2), place, steps)
    damage(place / "model.ckpt-2", kind)
    with Supervisor(place, save_model_secs=0).managed_session(state_of(1, 2)) as session:
        return f"goes on from step {session.global_step}, with a warning"


def damaged_orbax(place: Path, kind: str) -> str:
    state = state_of(1, 2)
    with ocp.CheckpointManager(place) as manager:
        for step in (1, 2):
            manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        damage(place / "2", kind)
        try:
            found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        except Exception as error:  # noqa: BLE001 - whatever it raises is what is reported
            return f"ends with {type(error).__name__}"
        same = all(np.array_equal(found[name], array) for name, array in state.items())
        return "restores it right" if same else "restores wrong values, and says nothing"


def print_speeds(title: str, megabytes: float, taken: list[dict[str, float]], base: str) -> None:
    """The medians, as MB/s and beside ``base``; the ratios are the medians of those of each round."""
    rows = []
    for name in taken[0]:
        secs = statistics.median(one[name] for one in taken)
        ratio = statistics.median(one[base] / one[name] for one in taken)
        rows.append([name, f"{secs:.3f} s", f"{megabytes / secs:,.0f} MB/s", f"{ratio:.2f}"])
    print_table([title, "time", "speed", f"speed, {base} = 1"], rows)


def rounds_of(rounds: int, measure: Callable[[int], dict[str, float]]) -> Iterator[dict[str, float]]:
    for turn in range(rounds):
        os.sync()
        yield measure(turn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="the size of the state")
    parser.add_argument("--arrays", type=int, nargs="+", default=[8, 1000], help="in how many arrays it is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    given = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("stepguard").setLevel(logging.INFO)
    logging.getLogger("stepguard").addHandler(logging.NullHandler())
    logging.getLogger("stepguard").propagate = False  # Orbax has made a handler of all.
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for arrays in given.arrays:
            state = state_of(given.megabytes, arrays)
            megabytes = sum(array.nbytes for array in state.values()) / 1e6
            what = f"{megabytes:.0f} MB in {arrays} arrays"
            written = list(rounds_of(given.rounds, lambda turn: write_secs(state, folder, turn)))  # noqa: B023
            print_speeds(f"written durably, {what}", megabytes, written, PLAIN)
            restored = list(rounds_of(given.rounds, lambda _: restore_secs(state, folder)))  # noqa: B023
            print_speeds(f"restored, {what}", megabytes, restored, ORBAX)
        rows = [[name, *outcomes.values()] for name, outcomes in damaged(folder).items()]
        print_table(["the newest checkpoint has", "a flipped byte", "a file cut in half"], rows)


if __name__ == "__main__":
    main()
