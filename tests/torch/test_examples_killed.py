"""Examples of whole programs: killed three times and started again, they are bit by bit what they are without kills."""

from __future__ import annotations

import random
import re
import socket
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import torch
from forked import fork
from killed_example import Kill, Watch, main

from stepguard.store import CheckpointStore
from stepguard.torch.checkpoint.of_rank import NOTES

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "torch"


class Program:
    """An example and the logdir in which it runs, in one or more processes."""

    def __init__(self, name: str, logdir: Path, *arguments: str, processes: int = 1) -> None:
        self.path = EXAMPLES / name
        self.logdir = logdir
        self.arguments = [f"--logdir={logdir}", *arguments]
        self.processes = processes

    def run(self, kill: Kill | None = None) -> list[int]:
        """Run it to its end or to ``kill``; the exit codes of its processes.

        Without a kill it is saved at its end only, so that the last checkpoint is of the end of the last epoch.
        """
        arguments = self.arguments if kill else [*self.arguments, "--save-model-secs=3600"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = []
        for rank in range(self.processes):
            place = {"RANK": str(rank), "WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1"}
            place = {**place, "MASTER_PORT": port} if self.processes > 1 else {}
            watch = Watch(self.seen_by(rank), self.logdir, kill if kill and kill.rank == rank else None)
            started.append(fork(main, str(self.path), arguments, watch, place))
        for process in started:
            process.join(150)
        assert all(process.exitcode is not None for process in started), self.output()
        return [process.exitcode for process in started]

    def seen_by(self, rank: int) -> Path:
        return self.logdir.with_suffix(f".seen-{rank}")

    def batches(self) -> dict[tuple[int, int, int], str]:
        """The digest of the batch of each turn by rank, step and turn. A turn that is done again has the same batch."""
        found: dict[tuple[int, int, int], str] = {}
        for rank in range(self.processes):
            for line in self.seen_by(rank).read_text().splitlines():
                step, turn, digest = line.split()
                place = rank, int(step), int(turn)
                assert found.setdefault(place, digest) == digest, f"another batch after a restart: {place}"
        return found

    def output(self) -> str:
        return "".join(Path(f"{self.seen_by(rank)}.output").read_text() for rank in range(self.processes))

    def last_state(self) -> dict[str, Any]:
        """All that the last checkpoint holds, as plain values by their places: weights, moments, streams, positions."""
        newest = CheckpointStore(self.logdir).newest_good(quarantine=False).checkpoint
        flat: dict[str, Any] = {"step": newest.step}
        for path in sorted(newest.path.glob("*.pt")):
            held = torch.load(path, weights_only=True)
            flatten(path.name, {key: one for key, one in held.items() if key not in NOTES}, flat)
        return flat


def flatten(place: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, one in value.items():
            flatten(f"{place}/{key}", one, into)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            flatten(f"{place}/{number}", one, into)
    elif isinstance(value, torch.Tensor):
        into[place] = (value.dtype, tuple(value.shape), value.numpy().tobytes())
    else:
        into[place] = value


def check(whole: Program, killed: Program, kills: list[Kill]) -> None:
    """``killed``, which is killed at each of ``kills``, sees the batches of ``whole`` and has its state at the end."""
    assert whole.run() == [0] * whole.processes, whole.output()
    for kill in kills:
        codes = killed.run(kill)
        assert codes[kill.rank] in ((1,) if kill.signal is SIGINT else (-kill.signal,)), killed.output()
    assert killed.run() == [0] * killed.processes, killed.output()

    resumed = [int(step) for step in re.findall(r"resumed at step (\d+) from", killed.output())]
    assert len(resumed) == len(kills)
    for step, kill in zip(resumed, kills, strict=True):
        # What a signal asks for is saved; SIGKILL costs the steps since the last checkpoint.
        assert step > 0
        assert kill.signal is SIGKILL or step >= kill.step
    assert killed.batches() == whole.batches()
    found, expected = killed.last_state(), whole.last_state()
    assert found.keys() == expected.keys()
    assert not {place for place, value in expected.items() if found[place] != value}


def test_the_language_model_is_the_same_after_three_kills(tmp_path):
    chance = random.Random(12)
    # Seven steps in an epoch, the last of two batches only; and the last epoch ends before its data.
    small = ("--steps=18", "--accumulate=3", "--batch-size=64", "--context=32", "--width=16", "--dtype=float16")
    kills = [
        Kill(SIGKILL, chance.randrange(3, 7), chance.randrange(3)),
        Kill(SIGTERM, chance.randrange(8, 11), chance.randrange(3)),
        Kill(SIGINT, chance.randrange(12, 17), chance.randrange(3), "trained"),
    ]
    whole = Program("language_model.py", tmp_path / "whole", *small)
    killed = Program("language_model.py", tmp_path / "killed", *small, "--save-model-secs=0.02")
    check(whole, killed, kills)


def test_the_images_are_learned_the_same_after_three_kills_in_two_processes(tmp_path):
    chance = random.Random(12)
    # Twelve steps in an epoch.
    small = ("--epochs=4", "--batch-size=64", "--width=4")
    kills = [
        Kill(SIGKILL, chance.randrange(3, 11), rank=1),
        Kill(SIGTERM, chance.randrange(13, 23), rank=1),
        Kill(SIGINT, 36, moment="evaluation"),
    ]
    whole = Program("images.py", tmp_path / "whole", *small, processes=2)
    killed = Program("images.py", tmp_path / "killed", *small, "--save-model-secs=0.02", processes=2)
    check(whole, killed, kills)
