"""An example program, run as it stands: it is killed where a test says so, and the batches that it sees are noted."""

from __future__ import annotations

import hashlib
import os
import random
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import begin

from stepguard.store import CheckpointStore


@dataclass(frozen=True)
class Kill:
    """A signal that a process sends itself: in a turn of the step ``step``, or in the evaluation after it.

    ``moment`` is "batch" (the turn begins), "trained" (its body has ended) or "evaluation".
    """

    signal: signal.Signals
    step: int
    turn: int = 0
    moment: str = "batch"
    rank: int = 0


@dataclass
class Watch:
    """What one process notes, and when it is killed."""

    seen: Path
    logdir: Path
    kill: Kill | None
    turns: int = field(default=0)

    def note(self, step: int, turn: int, batch: Any) -> None:
        digest = hashlib.sha256()
        for tensor in batch:
            digest.update(tensor.numpy().tobytes())
        with self.seen.open("a") as lines:
            lines.write(f"{step} {turn} {digest.hexdigest()}\n")

    def pass_by(self, moment: str, step: int, turn: int) -> None:
        kill = self.kill
        if kill is None or kill.moment != moment or (step, turn) < (kill.step, kill.turn):
            return
        if kill.signal is signal.SIGKILL and not self.has_checkpoint():
            return
        self.kill = None
        os.kill(os.getpid(), kill.signal)

    def has_checkpoint(self) -> bool:
        """Whether a restart has anything to go on from; a writer that has begun is waited for."""
        deadline = time.monotonic() + 0.5
        while not any(one.step for one in CheckpointStore(self.logdir).candidates()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


def watch_sessions(watch: Watch) -> None:
    """From now on ``watch`` sees every turn and every evaluation of the sessions of this process."""
    from stepguard.torch import Session

    plain_steps, plain_evaluating = Session.steps, Session.evaluating

    def turns(session: Session, batches: Iterator[Any]) -> Iterator[Any]:
        last, turn = -1, 0
        for batch in batches:
            step = session.global_step
            turn = turn + 1 if step == last else 0
            last = step
            watch.note(step, turn, batch)
            watch.pass_by("batch", step, turn)
            yield batch
            watch.pass_by("trained", step, turn)

    def steps(session: Session, *arguments: Any, **options: Any) -> Iterator[Any]:
        return turns(session, plain_steps(session, *arguments, **options))

    @contextmanager
    def evaluating(session: Session) -> Iterator[None]:
        with plain_evaluating(session):
            watch.pass_by("evaluation", session.global_step, 0)
            yield

    Session.steps, Session.evaluating = steps, evaluating


def main(program: str, arguments: list[str], watch: Watch, place: dict[str, str]) -> None:
    """Run ``program`` in this new process, with the variables ``place`` of torchrun."""
    import numpy as np
    import torch

    begin(f"{watch.seen}.output")
    # These examples seed PyTorch's streams only. The others are saved too.
    random.seed(1)
    np.random.seed(1)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.update(place)
    watch_sessions(watch)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
