"""What a checkpoint costs a PyTorch program: against a bare loop, torch.save and torch.distributed.checkpoint.

All in one run, so that the ratios mean something on a busy machine too::

    python benchmarks/torch_checkpoints.py --megabytes=200 --seconds=10
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor

SAVE_EVERY_SECS = 1.0


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


def step_overhead(steps: int = 200_000) -> float:
    """Seconds that a turn of `steps` costs, beyond that of a range."""
    sv = Supervisor({"model": torch.nn.Linear(1, 1)}, save_summaries_secs=0)
    with sv.managed_session() as session:
        began = time.perf_counter()
        for _ in session.steps(max_steps=steps):
            pass
        with_steps = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(steps):
        pass
    return (with_steps - (time.perf_counter() - began)) / steps


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


def durable(program: Program, folder: Path) -> tuple[float, float, float]:
    """Seconds for one durable save of ours, for a verified restore of ours, and for torch.load of the same file."""
    sv = Supervisor(
        {"model": program.model}, folder, save_model_secs=0, save_model_steps=1, save_summaries_secs=0, max_to_keep=1
    )
    with sv.managed_session() as session:
        for _ in session.steps(max_steps=1):
            pass
        # The first save takes the memory that later ones use again.
        while not CheckpointStore(folder).candidates():
            time.sleep(0.01)
        for _ in session.steps(max_steps=2):
            began = time.perf_counter()
        sv.stop()
        saved = time.perf_counter() - began
    checkpoint = CheckpointStore(folder).candidates()[0]
    began = time.perf_counter()
    with Supervisor({"model": program.model}, folder, save_model_secs=0, save_summaries_secs=0).managed_session():
        restored = time.perf_counter() - began
    began = time.perf_counter()
    program.model.load_state_dict(torch.load(checkpoint.path / "model.pt", weights_only=True))
    return saved, restored, time.perf_counter() - began


def damaged(folder: Path) -> dict[str, dict[str, str]]:
    """What a restore does after a flipped byte in the middle, and after the newest file was cut in half."""

    def damage(path: Path, kind: str) -> None:
        content = bytearray(path.read_bytes())
        if kind == "flipped byte":
            content[len(content) // 2] ^= 1
        path.write_bytes(content if kind == "flipped byte" else content[: len(content) // 2])

    def ours(place: Path, kind: str) -> str:
        small = torch.nn.Linear(300, 300)
        for steps in (1, 2):
            with Supervisor({"model": small}, place, save_model_secs=0, save_at_end=True).managed_session() as session:
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

    outcomes: dict[str, dict[str, str]] = {}
    for name, attempt in {"stepguard": ours, "torch.save": torch_save, "dcp": distributed}.items():
        for kind in ("flipped byte", "cut in half"):
            try:
                outcome = attempt(folder / f"{name}-{kind.split()[0]}", kind)
            except BaseException as error:  # noqa: BLE001 - dcp raises none that is an Exception; it is what is measured
                outcome = f"raises {type(error).__name__}"
            outcomes.setdefault(name, {})[kind] = outcome
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of the programs")
    parser.add_argument("--step-secs", type=float, default=0.02)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        program = Program(args.megabytes, args.step_secs)
        print(f"time added per step     {step_overhead() * 1e6:.2f} us")
        copy = statistics.median(copy_secs(program) for _ in range(3))
        print(f"one fresh copy          {copy * 1e3:.0f} ms for {args.megabytes} MB")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for title, run in {
            "bare": bare,
            "stepguard": with_stepguard,
            "torch.save": with_torch_save,
            "dcp.async_save": with_dcp_async,
        }.items():
            (folder / title).mkdir()
            lengths = run(program, folder / title, args.seconds)
            ordered = sorted(lengths)
            # The first save takes the memory that later ones use again.
            later = sorted(lengths[len(lengths) // 4 :])
            print(
                f"{title:16} steps {len(lengths):5d}   median {statistics.median(lengths) * 1e3:6.1f} ms   "
                f"99% {ordered[int(len(ordered) * 0.99)] * 1e3:7.1f} ms   longest {ordered[-1] * 1e3:7.1f} ms   "
                f"longest of the last 3/4 {later[-1] * 1e3:7.1f} ms"
            )
            shutil.rmtree(folder / title)
        writes = [plain_write_secs(folder, args.megabytes * 1_000_000) for _ in range(3)]
        plain = statistics.median(writes)
        rounds = [durable(program, folder / f"durable{number}") for number in range(3)]
        saved, restored, loaded = (statistics.median(one[index] for one in rounds) for index in range(3))
        print(f"durable write   {saved:.2f} s; plain write and fsync {plain:.2f} s: {plain / saved:.2f} of its speed")
        print(f"verified restore {restored:.2f} s; torch.load {loaded:.2f} s: {restored / loaded:.2f}")
        for name_, outcomes in damaged(folder).items():
            for kind, outcome in outcomes.items():
                print(f"{name_:16} {kind:14} {outcome}")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
