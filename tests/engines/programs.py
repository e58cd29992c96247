"""What the suite asks of every engine: a small program under its Supervisor, and a look into its checkpoints.

A program trains a model of ``size`` integers. One step raises each of them by one, so that in every state that
belongs to one step all of them equal the step, and a state that mixes two shows it. Beside them is a ``weight`` that no
step changes, for :meth:`Program.spoil`.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepguard.store import CheckpointStore

# More than anything here takes on a busy machine, and less than anyone would wait.
SOON_SECS = 60.0

Values = list[int]


def wait_until(condition: Callable[[], object], what: str, *, within_secs: float = SOON_SECS) -> None:
    """Wait for ``condition``, or fail saying ``what`` did not come."""
    deadline = time.monotonic() + within_secs
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_secs:g} s"
        time.sleep(0.002)


class Program(ABC):
    """A Supervisor and the model it supervises. ``sv`` is the Supervisor."""

    sv: Any

    @abstractmethod
    def run_step(self, session: Any) -> None:
        """One training step. Any thread."""

    @abstractmethod
    def run_step_with(self, session: Any, halfway: Callable[[], object]) -> None:
        """One training step that calls ``halfway()`` in its middle, when some of the integers are raised."""

    @abstractmethod
    def values(self, session: Any) -> Values:
        """The integers of the model."""

    @abstractmethod
    def step(self, session: Any) -> int:
        """The step counter of the model."""

    @abstractmethod
    def fail_prepare(self, error: BaseException) -> None:
        """Have the next preparation of a session raise ``error``, when the session was made already if there is one."""

    @abstractmethod
    def report(self, session: Any, number: float) -> None:
        """Have the program compute a number, "loss", that its Supervisor gets to see. Not inside a step."""

    @abstractmethod
    def spoil(self, session: Any) -> None:
        """Make a part of the saved state, "weight", NaN: one that steps leave alone."""

    def metrics(self, session: Any, **values: float) -> None:
        """Hand over what was measured of the last step."""
        # The sessions of loop frameworks have the method; for the others it is the Supervisor's.
        if hasattr(session, "metrics"):
            session.metrics(values)
        else:
            self.sv.metrics(session, values)

    def save(self, session: Any, name: str | None = None) -> None:
        """Save the last step now."""
        if hasattr(session, "metrics"):
            session.save(name)
        else:
            self.sv.save(session, name)

    def open_session(self) -> Any:
        """A prepared session with its services running."""
        return self.sv.prepare_or_wait_for_session()

    def run_steps(self, session: Any, count: int) -> None:
        for _ in range(count):
            self.run_step(session)

    def train(self, count: int) -> int:
        """A whole run of ``count`` steps; the step that it began at."""
        with self.sv.managed_session() as session:
            first = self.step(session)
            assert self.values(session) == [first] * len(self.values(session))
            self.run_steps(session, count)
        return first

    def wait_until_saved(self, step: int, engine: EngineUnderTest, logdir: Path) -> None:
        """Wait until ``step`` is committed, and until what comes after a commit is done as well."""
        wait_until(
            lambda: step in engine.committed(logdir) and not self.sv._saving.writer.busy,
            f"the checkpoint of step {step}",
        )

    # The one place where the suite reaches behind the Supervisor's own door: the engine is what an engine's author
    # writes, and what fails.

    def intercept(self, method: str, before: Callable[..., None]) -> None:
        """Call ``before(*arguments)`` in front of each call of a method of the engine, from the next session on."""
        engine = self.sv._engine
        original = getattr(engine, method)

        def call(*arguments: Any) -> Any:
            before(*arguments)
            return original(*arguments)

        setattr(engine, method, call)

    def is_open(self, session: Any) -> bool:
        return bool(self.sv._engine.is_open(session))


class EngineUnderTest(ABC):
    """One engine, as the suite sees it."""

    name: str

    @abstractmethod
    def program(self, logdir: Path | str | None, *, size: int = 6, **options: Any) -> Program:
        """A program with a new model. ``options`` are those that every engine's Supervisor has."""

    @abstractmethod
    def end_of_input(self) -> Exception:
        """What the framework raises when the input is exhausted."""

    @abstractmethod
    def read(self, checkpoint: Path) -> Values:
        """The integers in the checkpoint with this path, read without any Supervisor; the step is in its name."""

    def committed(self, logdir: Path) -> list[int]:
        """The steps of the committed checkpoints, oldest first."""
        found = CheckpointStore(logdir).candidates()
        return sorted(one.step for one in found if one.is_committed and one.step is not None)

    def saved(self, logdir: Path) -> dict[int, Values]:
        """What the committed checkpoints hold, by step."""
        return {step: self.read(logdir / f"model.ckpt-{step}") for step in self.committed(logdir)}

    def damage(self, logdir: Path, step: int) -> None:
        """Flip one bit in the largest file that a restore of a committed checkpoint reads: its size stays."""
        store = CheckpointStore(logdir)
        (found,) = [one for one in store.candidates() if one.step == step]
        manifest = store.read_manifest(found)
        assert manifest is not None
        needed = [one for one in manifest.files if not one.name.endswith(".meta")]
        path = logdir / max(needed, key=lambda one: one.size).name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


class Gate:
    """Where threads of a test wait until it lets them go on. Opened at the end of every test."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()

    def pass_through(self, *_: object) -> None:
        self._reached.set()
        assert self._open.wait(SOON_SECS)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(SOON_SECS)

    def open(self) -> None:
        self._open.set()
