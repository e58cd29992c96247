"""The suite's programs on JAX: each integer is an array of its own, and a step raises one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from programs import EngineUnderTest, Program, Values

from stepguard.jax import Supervisor


class BoundSupervisor(Supervisor):
    """A Supervisor with the state that it trains: the suite opens sessions without arguments."""

    size: int

    def initial(self) -> Any:
        return {"integers": [jnp.zeros((), jnp.int32) for _ in range(self.size)], "weight": jnp.zeros(())}

    def prepare_or_wait_for_session(self, *arguments: Any, **options: Any) -> Any:
        # The Supervisor's own context hands its state on.
        state = arguments[:1] if arguments and isinstance(arguments[0], dict) else (self.initial(), *arguments)
        return super().prepare_or_wait_for_session(*state, *arguments[1:], **options)

    def managed_session(self, *arguments: Any, **options: Any) -> Any:
        return super().managed_session(self.initial(), *arguments, **options)


class JaxProgram(Program):
    def __init__(self, logdir: Path | str | None, *, size: int, **options: Any) -> None:
        self._prepare_error: BaseException | None = None
        self.sv = BoundSupervisor(
            logdir, init_fn=self._on_init, summaries=lambda state: {"first": state["integers"][0]}, **options
        )
        self.sv.size = size
        engine: Any = self.sv._engine
        prepare = engine.prepare
        engine.prepare = lambda *arguments: prepare(*(arguments or (self.sv.initial(),)))

    def _on_init(self, state: Any) -> Any:
        if self._prepare_error is not None:
            raise self._prepare_error
        return state

    def run_step(self, session: Any) -> None:
        with session.step():
            raised = [value + 1 for value in session.state["integers"]]
            session.state = {**session.state, "integers": raised}
        # The suite waits for its services between two steps, and lends the state to nobody there.
        session.boundary.come_back()
        session.boundary.call_due()

    def run_step_with(self, session: Any, halfway: Callable[[], object]) -> None:
        integers = session.state["integers"]
        with session.step():
            # In place, which is possible too: the tree is the program's own.
            integers[0] = integers[0] + 1
            halfway()
            integers[1:] = [value + 1 for value in integers[1:]]
        session.boundary.come_back()
        session.boundary.call_due()

    def values(self, session: Any) -> Values:
        return [int(value) for value in session.state["integers"]]

    def step(self, session: Any) -> int:
        return int(session.global_step)

    def report(self, session: Any, number: float) -> None:
        session.summary({"loss": jnp.asarray(number)})

    def spoil(self, session: Any) -> None:
        session.state = {**session.state, "weight": jnp.asarray(np.nan)}

    def fail_prepare(self, error: BaseException | None) -> None:
        self._prepare_error = error


class JaxUnderTest(EngineUnderTest):
    name = "jax"

    def program(self, logdir: Path | str | None, *, size: int = 6, **options: Any) -> JaxProgram:
        return JaxProgram(logdir, size=size, **options)

    def end_of_input(self) -> Exception:
        return StopIteration()

    def read(self, checkpoint: Path) -> Values:
        # By Orbax, which knows nothing of Stepguard.
        state = ocp.StandardCheckpointer().restore(checkpoint)
        return [int(value) for value in state["integers"]]
