"""The suite's programs on PyTorch: each integer is a tensor of its own, and a step raises one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from programs import EngineUnderTest, Program, Values

from stepguard.torch import Supervisor


class Integers(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        for index in range(size):
            self.register_buffer(f"v{index:03d}", torch.zeros(1, dtype=torch.int64))


class TorchProgram(Program):
    def __init__(self, logdir: Path | str | None, *, size: int, **options: Any) -> None:
        self._prepare_error: BaseException | None = None
        self._model = Integers(size)
        self._weight = torch.nn.Linear(1, 1)
        self.sv = Supervisor(
            {"model": self._model, "weight": self._weight},
            logdir=logdir,
            init_fn=self._on_init,
            summaries=lambda: {"first": self._model.v000},
            **options,
        )

    def _on_init(self) -> None:
        if self._prepare_error is not None:
            raise self._prepare_error
        # The model is the program's own, and may have been trained by an earlier run: this is what begins anew.
        for value in (*self._model.buffers(), self._weight.bias.data):
            value.zero_()

    def run_step(self, session: Any) -> None:
        with session.step():
            for value in self._model.buffers():
                value += 1
        # The suite waits for its services between two steps, and does nothing there: the next step is as good as begun.
        session.boundary.come_back()
        session.boundary.call_due()

    def run_step_with(self, session: Any, halfway: Callable[[], object]) -> None:
        first, *others = self._model.buffers()
        with session.step():
            first += 1
            halfway()
            for value in others:
                value += 1
        session.boundary.come_back()
        session.boundary.call_due()

    def values(self, session: Any) -> Values:
        return [int(value) for value in self._model.buffers()]

    def step(self, session: Any) -> int:
        return int(session.global_step)

    def report(self, session: Any, number: float) -> None:
        session.summary({"loss": torch.tensor(number)})

    def spoil(self, session: Any) -> None:
        with torch.no_grad():
            self._weight.bias.fill_(float("nan"))

    def fail_prepare(self, error: BaseException | None) -> None:
        self._prepare_error = error


class TorchUnderTest(EngineUnderTest):
    name = "torch"

    def program(self, logdir: Path | str | None, *, size: int = 6, **options: Any) -> TorchProgram:
        return TorchProgram(logdir, size=size, **options)

    def end_of_input(self) -> Exception:
        return StopIteration()

    def read(self, checkpoint: Path) -> Values:
        process = torch.load(checkpoint / "process-0.pt", weights_only=True)
        assert process["global_step"] == int(checkpoint.name.rpartition("-")[2])
        model = torch.load(checkpoint / "model.pt", weights_only=True)
        return [int(model[name]) for name in sorted(model)]
