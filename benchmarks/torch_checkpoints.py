"""What a checkpoint costs a PyTorch program: against a bare loop, torch.save, torch.distributed.checkpoint's
async_save, Lightning and Ignite.

All in one run and in turns, so that the ratios mean something on a busy machine too::

    python benchmarks/torch_checkpoints.py --megabytes=200 --seconds=6 --rounds=3

Lightning and Ignite are measured where they are installed: ``pip install 'stepguard[bench]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib.util
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import print_table

from stepguard import Saving
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor

SAVE_EVERY_SECS = 1.0
AT_THE_END = Saving(save_model_secs=0, save_at_end=True)
PLAIN = "a plain write and fsync of the same bytes"
# The packages of the peers that have to be installed.
PACKAGES = {"Lightning": "lightning", "Ignite": "ignite"}


class Program:
    """A step of a fixed length on one tensor, beside a state of the size that is asked for."""

    def __init__(self, megabytes: int, step_secs: float) -> None:
        parts = 8
        size = megabytes * 1_000_000 // 4 // parts
        self.model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size)) for _ in range(parts)])
        self._matrix = torch.randn(256, 256)
        self._step_secs = step_secs

    def step(self) -> None:
        until = time.perf_counter() + self._step_secs
        while time.perf_counter() < until:
            torch.mm(self._matrix, self._matrix)
        with torch.no_grad():
            self.model[0][:1000] += 1


def timed(program: Program, seconds: float, turns: Iterator[Any], after_step: Callable[[], None]) -> list[float]:
    """The length of each step, from one turn of the loop to the next."""
    lengths = []
    end = time.perf_counter() + seconds
    began = time.perf_counter()
    for _ in turns:
        program.step()
        after_step()
        now = time.perf_counter()
        lengths.append(now - began)
        began = now
        if now > end:
            break
    return lengths


def forever() -> Iterator[int]:
    step = 0
    while True:
        yield step
        step += 1


def every(seconds: float, save: Callable[[int], None]) -> Callable[[], None]:
    state = {"due": time.perf_counter(), "count": 0}

    def after_step() -> None:
        if time.perf_counter() >= state["due"]:
            state["due"] += seconds
            state["count"] += 1
            save(int(state["count"]))

    return after_step


def bare(program: Program, _: Path, seconds: float) -> list[float]:
    return timed(program, seconds, forever(), lambda: None)


def with_stepguard(program: Program, folder: Path, seconds: float) -> list[float]:
    sv = Supervisor(
        {"model": program.model}, folder, save_model_secs=SAVE_EVERY_SECS, save_summaries_secs=0, max_to_keep=2
    )
    with sv.managed_session() as session:
        return timed(program, seconds, session.steps(), lambda: None)


def with_torch_save(program: Program, folder: Path, seconds: float) -> list[float]:
    def save(number: int) -> None:
        torch.save({"model": program.model.state_dict()}, folder / f"{number % 2}.pt")

    return timed(program, seconds, forever(), every(SAVE_EVERY_SECS, save))


def with_dcp_async(program: Program, folder: Path, seconds: float) -> list[float]:
    running: list[Any] = []

    def save(number: int) -> None:
        if running and not running[-1].done():
            return
        shutil.rmtree(folder / str(number - 2), ignore_errors=True)
        running.append(dcp.async_save({"model": program.model.state_dict()}, checkpoint_id=folder / str(number)))

    lengths = timed(program, seconds, forever(), every(SAVE_EVERY_SECS, save))
    running[-1].result()
    return lengths


class Turns:
    """Stands where a framework wants batches, until the time is up; notes the length of each turn of its loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.lengths: list[float] = []

    def __iter__(self) -> Iterator[int]:
        end = time.perf_counter() + self._seconds
        began = time.perf_counter()
        yield 0
        while (now := time.perf_counter()) < end:
            self.lengths.append(now - began)
            began = now
            yield len(self.lengths)


def lightning_trainer(program: Program, folder: Path, *, counts_steps: bool = False, **options: Any) -> tuple[Any, Any]:
    """A Trainer without its progress bar and loggers, and a module whose step is the program's.

    Lightning saves nothing between two steps of its optimizer: with ``counts_steps`` there is one, of one number.
    """
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.parameters_of_program = program.model
            self.number = torch.nn.Parameter(torch.zeros(1))
            self.automatic_optimization = counts_steps

        def training_step(self, *_: Any) -> Any:
            program.step()
            return self.number.sum() if counts_steps else None

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.number], 0.1) if counts_steps else None

    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        max_steps=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    return trainer, Module()


def with_lightning(program: Program, folder: Path, seconds: float) -> list[float]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    saving = ModelCheckpoint(
        dirpath=folder,
        train_time_interval=dt.timedelta(seconds=SAVE_EVERY_SECS),
        save_top_k=1,
        save_on_train_epoch_end=False,
    )
    trainer, module = lightning_trainer(program, folder, counts_steps=True, callbacks=[saving])
    turns = Turns(seconds)
    trainer.fit(module, turns)
    return turns.lengths


def nothing(*_: Any) -> None:
    """A step that does nothing."""


def with_ignite(program: Program, folder: Path, seconds: float) -> list[float]:
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    trainer = Engine(lambda *_: program.step())
    saving = Checkpoint({"model": program.model}, DiskSaver(str(folder), require_empty=False), n_saved=2)
    after_step = every(SAVE_EVERY_SECS, lambda _: saving(trainer))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, after_step)
    turns = Turns(seconds)
    # It ends with its data: an epoch of a length that is never reached would begin them again.
    trainer.run(turns, max_epochs=1)
    return turns.lengths


class Idle(Program):
    """A step that does nothing."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)  # type: ignore[assignment]

    def step(self) -> None:
        """Nothing."""


def step_overheads(names: Iterable[str], folder: Path, steps: int, rounds: int) -> dict[str, float]:
    """Seconds that a turn of each loop takes beyond one of ``range``, without any checkpoint; medians."""

    def bare_turns() -> None:
        for _ in range(steps):
            pass

    def ours() -> None:
        sv = Supervisor({"model": torch.nn.Linear(1, 1)}, save_summaries_secs=0)
        with sv.managed_session() as session:
            for _ in session.steps(max_steps=steps):
                pass

    def lightning() -> None:
        trainer, module = lightning_trainer(Idle(), folder, enable_checkpointing=False)
        trainer.fit(module, range(steps))

    def ignite() -> None:
        from ignite.engine import Engine

        Engine(nothing).run(range(steps), max_epochs=1)

    loops = {"bare loop": bare_turns, "stepguard": ours, "Lightning": lightning, "Ignite": ignite}
    taken: dict[str, list[float]] = {name: [] for name in loops if name in names}
    for _ in range(rounds):
        for name, times in taken.items():
            began = time.perf_counter()
            loops[name]()
            times.append((time.perf_counter() - began) / steps)
    bare_secs = statistics.median(taken["bare loop"])
    return {name: statistics.median(times) - bare_secs for name, times in taken.items() if name != "bare loop"}


def copy_secs(program: Program) -> float:
    """One fresh copy of the state in memory."""
    began = time.perf_counter()
    copies = [parameter.detach().clone() for parameter in program.model]
    took = time.perf_counter() - began
    del copies
    return took


def plain_write_secs(folder: Path, size: int) -> float:
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with open(folder / "plain", "wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    (folder / "plain").unlink()
    return took


@contextlib.contextmanager
def logged_saves() -> Iterator[list[float]]:
    """The seconds that each save took, of those that ours logs inside the block."""
    saves: list[float] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("saved step") and isinstance(record.args, tuple):
                saves.append(float(record.args[-1]))  # type: ignore[arg-type]

    logger, handler = logging.getLogger("stepguard"), Handler()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield saves
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def durable_write_secs(program: Program, folder: Path, turn: int) -> dict[str, float]:
    """From a state in memory to the moment at which no crash can lose it, for each way of writing it.

    Each turn begins with another one: the first finds the memory for its files colder than those after it.
    """
    state = program.model.state_dict()

    def ours(place: Path) -> float:
        sv = Supervisor({"model": program.model}, place, saving=AT_THE_END, save_summaries_secs=0)
        with logged_saves() as saves, sv.managed_session() as session:
            for _ in session.steps(max_steps=1):
                pass
        # What is logged is the time from the snapshot to the commit.
        return saves[-1]

    def synced_torch_save(place: Path) -> float:
        place.mkdir()
        began = time.perf_counter()
        with open(place / "w.pt", "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        return time.perf_counter() - began

    def synced_dcp(place: Path) -> float:
        began = time.perf_counter()
        # Its writer fsyncs each file (`sync_files`), though not the directory.
        dcp.save(dict(state), checkpoint_id=place)
        return time.perf_counter() - began

    def plain(place: Path) -> float:
        place.mkdir()
        return plain_write_secs(place, sum(tensor.nbytes for tensor in state.values()))

    ways = {PLAIN: plain, "stepguard": ours, "torch.save and fsync": synced_torch_save, "dcp.save": synced_dcp}
    taken = {}
    first = turn % len(ways)
    for name in [*list(ways)[first:], *list(ways)[:first]]:
        taken[name] = ways[name](folder / "durable")
        shutil.rmtree(folder / "durable")
    return taken


def restore_secs(program: Program, folder: Path) -> dict[str, float]:
    """From files to the parameters of the program: ours with the verification of every byte, the others without."""
    place = folder / "restored"
    with Supervisor({"model": program.model}, place, saving=AT_THE_END).managed_session() as session:
        for _ in session.steps(max_steps=1):
            pass
    path = CheckpointStore(place).candidates()[0].path / "model.pt"
    sv = Supervisor({"model": program.model}, place, save_model_secs=0, save_summaries_secs=0)
    began = time.perf_counter()
    with sv.managed_session():
        ours = time.perf_counter() - began
    began = time.perf_counter()
    program.model.load_state_dict(torch.load(path, weights_only=True))
    loaded = time.perf_counter() - began
    dcp.save(program.model.state_dict(), checkpoint_id=place / "dcp")
    began = time.perf_counter()
    state = program.model.state_dict()
    dcp.load(state, checkpoint_id=place / "dcp")
    program.model.load_state_dict(state)
    distributed = time.perf_counter() - began
    shutil.rmtree(place)
    return {"stepguard": ours, "torch.load": loaded, "dcp.load": distributed}


def damaged(names: Iterable[str], folder: Path) -> dict[str, dict[str, str]]:
    """What a restore does after a flipped byte in the middle, and after the newest file was cut in half."""

    def damage(path: Path, kind: str) -> None:
        content = bytearray(path.read_bytes())
        if kind == "flipped byte":
            content[len(content) // 2] ^= 1
        path.write_bytes(content if kind == "flipped byte" else content[: len(content) // 2])

    def ours(place: Path, kind: str) -> str:
        small = torch.nn.Linear(300, 300)
        for steps in (1, 2):
            with Supervisor({"model": small}, place, saving=AT_THE_END).managed_session() as session:
                for _ in session.steps(max_steps=steps):
                    pass
        damage(place / "model.ckpt-2" / "model.pt", kind)
        with Supervisor({"model": small}, place, save_model_secs=0).managed_session() as session:
            return f"resumes from step {session.global_step}, with a warning"

    def torch_save(place: Path, kind: str) -> str:
        place.mkdir()
        weights = torch.nn.Linear(300, 300).state_dict()
        torch.save(weights, place / "w.pt")
        damage(place / "w.pt", kind)
        loaded = torch.load(place / "w.pt", weights_only=True)
        same = all(torch.equal(weights[name], loaded[name]) for name in weights)
        return "loads it right" if same else "loads the wrong values, and says nothing"

    def distributed(place: Path, kind: str) -> str:
        weights = torch.nn.Linear(300, 300).state_dict()
        dcp.save(dict(weights), checkpoint_id=place)
        damage(max(place.glob("*.distcp"), key=lambda path: path.stat().st_size), kind)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        dcp.load(loaded, checkpoint_id=place)
        same = all(torch.equal(weights[name], loaded[name]) for name in weights)
        return "loads it right" if same else "loads the wrong values, and says nothing"

    def lightning(place: Path, kind: str) -> str:
        place.mkdir()
        program = Idle()
        program.model = torch.nn.Linear(300, 300)  # type: ignore[assignment]
        trainer, module = lightning_trainer(program, place, enable_checkpointing=False)
        trainer.fit(module, range(1))
        for number in (1, 2):
            trainer.save_checkpoint(place / f"{number}.ckpt")
        weights = {name: tensor.clone() for name, tensor in program.model.state_dict().items()}
        damage(place / "2.ckpt", kind)
        for tensor in program.model.parameters():
            tensor.data.zero_()
        trainer, module = lightning_trainer(program, place, enable_checkpointing=False)
        trainer.fit(module, range(2), ckpt_path=place / "2.ckpt")
        same = all(torch.equal(weights[name], tensor) for name, tensor in program.model.state_dict().items())
        return "loads it right" if same else "loads the wrong values, and says nothing"

    def ignite(place: Path, kind: str) -> str:
        from ignite.engine import Engine
        from ignite.handlers import Checkpoint, DiskSaver

        model = torch.nn.Linear(300, 300)
        trainer = Engine(nothing)
        saving = Checkpoint({"model": model}, DiskSaver(str(place)), n_saved=2)
        for epoch in (1, 2):
            trainer.state.iteration = epoch
            saving(trainer)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        newest = place / str(saving.last_checkpoint)
        damage(newest, kind)
        Checkpoint.load_objects({"model": model}, str(newest))
        same = all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        return "loads it right" if same else "loads the wrong values, and says nothing"

    attempts = {
        "stepguard": ours,
        "torch.save": torch_save,
        "dcp.async_save": distributed,
        "Lightning": lightning,
        "Ignite": ignite,
    }
    outcomes: dict[str, dict[str, str]] = {}
    for name, attempt in attempts.items():
        if name not in names:
            continue
        for kind in ("flipped byte", "cut in half"):
            try:
                outcome = attempt(folder / f"{name}-{kind.split()[0]}", kind)
            except BaseException as error:  # noqa: BLE001 - dcp raises none that is an Exception; it is what is measured
                outcome = f"raises {type(error).__name__}, and stops"
            outcomes.setdefault(name, {})[kind] = outcome
    return outcomes


def installed() -> list[str]:
    """The peers that can be measured here; says which cannot."""
    names = list(LOOPS)
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            print(f"NOT MEASURED: {name} is not installed (pip install 'stepguard[bench]')\n")
            names.remove(name)
    return names


LOOPS: dict[str, Callable[[Program, Path, float], list[float]]] = {
    "bare loop": bare,
    "stepguard": with_stepguard,
    "torch.save": with_torch_save,
    "dcp.async_save": with_dcp_async,
    "Lightning": with_lightning,
    "Ignite": with_ignite,
}


def compare_training(names: list[str], program: Program, folder: Path, args: argparse.Namespace) -> None:
    """The steps of each program while it saves every second; in turns, medians of the rounds."""
    copies, taken = [], {name: [] for name in names}  # type: ignore[var-annotated]
    for _ in range(args.rounds):
        copies.append(copy_secs(program))
        for name in names:
            (folder / "loop").mkdir()
            lengths = sorted(LOOPS[name](program, folder / "loop", args.seconds))
            taken[name].append(
                (len(lengths), statistics.median(lengths), lengths[int(0.99 * len(lengths))], lengths[-1])
            )
            # What saves nothing has short steps.
            saved = sum(path.stat().st_size for path in (folder / "loop").rglob("*") if path.is_file())
            if name != "bare loop" and saved < args.megabytes * 1_000_000:
                sys.exit(f"{name}: expected a checkpoint of {args.megabytes} MB, found {saved} bytes")
            shutil.rmtree(folder / "loop")
    copy = statistics.median(copies)
    normal = statistics.median(one[1] for one in taken["bare loop"])
    rows = []
    for name, rounds in taken.items():
        count, median, late, longest = (statistics.median(one[index] for one in rounds) for index in range(4))
        rows.append([name, int(count), median * 1e3, late * 1e3, longest * 1e3, (longest - normal) / copy])
    print(
        f"A step of {normal * 1e3:.1f} ms, {args.megabytes} MB saved every second; milliseconds, medians of the rounds."
    )
    print(f"One fresh copy of the state takes {copy * 1e3:.0f} ms.\n")
    print_table(
        ["", "steps", "median step", "99th percentile", "longest", "longest less a normal one, in fresh copies"], rows
    )


def compare_files(program: Program, folder: Path, args: argparse.Namespace) -> None:
    """Writing and reading, in turns: medians, and the medians of the ratios within a turn."""
    turns = [(durable_write_secs(program, folder, turn), restore_secs(program, folder)) for turn in range(args.repeats)]
    middle = statistics.median
    rows = []
    for name in (PLAIN, *(one for one in turns[0][0] if one != PLAIN)):
        ratios = [one[0][PLAIN] / one[0][name] for one in turns]
        rows.append([name, middle(one[0][name] for one in turns) * 1e3, middle(ratios)])
    print_table(["a durable write", "ms", "speed / a plain write's"], rows)
    rows = []
    for name in turns[0][1]:
        ratios = [one[1][name] / one[1]["torch.load"] for one in turns]
        rows.append([name, middle(one[1][name] for one in turns) * 1e3, middle(ratios)])
    print_table(["a restore", "ms", "time / torch.load's"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each of the programs, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7, help="of the durable writes and the restores")
    parser.add_argument("--step-secs", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=20_000, help="for the time added to each")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("stepguard").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = installed()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        overheads = step_overheads(names, folder, args.steps, args.rounds)
        print_table(["time added to each step", "us"], [[name, secs * 1e6] for name, secs in overheads.items()])
        program = Program(args.megabytes, args.step_secs)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        compare_training(names, program, folder, args)
        compare_files(program, folder, args)
        outcomes = damaged(names, folder)
        kinds = ["flipped byte", "cut in half"]
        print_table(
            ["newest checkpoint", *kinds], [[one, *(found[kind] for kind in kinds)] for one, found in outcomes.items()]
        )
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
