"""PyTorch: steps that are done again are compared, and each cause of a resume that is not exact is named.

A program crashes after step 16 and goes on from its checkpoint of step 10. Faults are planted into it that make the
second run another one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from stepguard.options import Guarding, Restoring, Saving, Watching
from stepguard.steps import step_digests
from stepguard.torch import Supervisor
from stepguard.torch.digests import hyperparameters, tensor_bytes
from stepguard.watching import ledger, trace
from stepguard.watching.trace import Record

ITEMS = 48


class CrashError(Exception):
    """Ends a run without a last checkpoint, as a kill does."""


class Items(Dataset):
    """Items that are changed by ``augment`` whenever they are loaded."""

    def __init__(self, augment: Callable[[], torch.Tensor] | None = None) -> None:
        self.inputs = torch.randn(ITEMS, 4, generator=torch.Generator().manual_seed(5))
        self.targets = self.inputs.sum(1, keepdim=True)
        self.augment = (lambda: torch.rand(4)) if augment is None else augment

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.inputs[index] + 0.01 * self.augment(), "y": self.targets[index]}


class OwnOrder(Sampler):
    """Shuffles by a generator of its own, which nobody seeds or saves."""

    def __len__(self) -> int:
        return ITEMS

    def __iter__(self) -> Any:
        return iter(random.Random().sample(range(ITEMS), ITEMS))


class Program:
    """A training program, exact as it is; a fault overrides what it spoils."""

    rate = 0.01
    resume_data: bool | str = True

    def __init__(self, logdir: Path, *, starts: int, trace: str | None) -> None:
        torch.manual_seed(3)
        torch.set_num_threads(1)
        self.starts = starts
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.rate, momentum=0.9)
        self.loader = self.new_loader()
        self.sv = Supervisor(
            {"model": self.model, "optimizer": self.optimizer},
            logdir,
            saving=Saving(save_model_secs=0, save_model_steps=10, save_at_end=False),
            watching=Watching(trace=trace, save_summaries_secs=0),
            restoring=Restoring(hyperparameters="program"),
        )

    def new_loader(self) -> Any:
        return DataLoader(Items(), 8, shuffle=True)

    def loss(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.model(batch["x"]), batch["y"])

    def before(self) -> None:
        """Called before the loop."""

    def after(self, step: int) -> None:
        """Called in each step, after the training."""

    def run(self, until: int) -> None:
        with self.sv.managed_session() as sess:
            self.before()
            for batch in sess.steps(self.loader, max_steps=until, resume_data=self.resume_data):
                loss = self.loss(batch, sess.global_step)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                sess.summary({"loss": loss})
                self.after(sess.global_step)
            if not self.starts:
                self.sv._saving.writer.drain(30)
                raise CrashError


def crash_and_go_on(logdir: Path, kind: type[Program], *, trace: str | None = "batches") -> dict[str, Any] | None:
    with pytest.raises(CrashError):
        kind(logdir, starts=0, trace=trace).run(17)
    kind(logdir, starts=1, trace=trace).run(20)
    found = [one for one in ledger.read(logdir) if one["event"] == "replay"]
    assert len(found) <= 1
    return found[0] if found else None


def test_an_exact_program_does_the_same_again(tmp_path: Path) -> None:
    found = crash_and_go_on(tmp_path, Program)
    assert found is not None
    assert found["message"] == ("steps 10 to 16 were done again: bit for bit the same (batches, random states, loss)")


def test_by_default_the_numbers_are_compared(tmp_path: Path) -> None:
    found = crash_and_go_on(tmp_path, Program, trace="numbers")
    assert found is not None
    assert found["message"] == "steps 10 to 16 were done again: bit for bit the same (loss)"
    kinds = {one.kind for one in trace.read(tmp_path) if isinstance(one, Record)}
    assert kinds == {"numbers"}


class OtherOrder(Program):
    resume_data = "unchecked"

    def new_loader(self) -> DataLoader:
        return DataLoader(Items(), 8, sampler=OwnOrder())


class Prefetcher:
    """Reads ahead from a loader whose order it draws itself, in a thread of its own."""

    def __iter__(self) -> Any:
        loader = DataLoader(Items(), 8, sampler=random.SystemRandom().sample(range(ITEMS), ITEMS))
        with ThreadPoolExecutor(1) as pool:
            yield from pool.submit(list, loader).result()


class Prefetches(Program):
    resume_data = "unchecked"

    def new_loader(self) -> Any:
        return Prefetcher()


class OtherAugmentation(Program):
    def new_loader(self) -> DataLoader:
        def unseeded() -> torch.Tensor:
            source = torch.Generator()
            source.seed()
            return torch.rand(4, generator=source)

        return DataLoader(Items(unseeded), 8, shuffle=True)


class EvaluatesAtItsStart(Program):
    evaluated = False

    def after(self, step: int) -> None:
        if not self.evaluated:
            self.evaluated = True
            self.model(torch.ones(1, 4))  # the dropout draws


class OtherRate(Program):
    def __init__(self, logdir: Path, *, starts: int, trace: str | None) -> None:
        self.rate = 0.01 if starts == 0 else 0.02
        super().__init__(logdir, starts=starts, trace=trace)


class KeepsSomethingForItself(Program):
    mean = 0.0

    def loss(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        loss = super().loss(batch, step)
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss / (1 + self.mean)


class AppliesGradientsLater(Program):
    """Keeps the gradients of a step for the next one, in a list of its own."""

    waiting: Sequence[torch.Tensor] = ()

    @torch.no_grad()
    def after(self, step: int) -> None:
        weights = list(self.model.parameters())
        for weight, gradient in zip(weights, self.waiting, strict=False):
            weight -= 0.01 * gradient
        self.waiting = [weight.grad.clone() for weight in weights]


class ComputesDifferently(Program):
    """As kernels do whose sums come in another order: from step 12 on, in the last bits."""

    def loss(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return super().loss(batch, step) * (1 + 3e-7 * self.starts * (step >= 12))


class ChangesTheModel(Program):
    def before(self) -> None:
        if self.starts:
            torch.nn.init.zeros_(self.model[2].bias)


@pytest.mark.parametrize(
    ("kind", "cause", "at", "said"),
    [
        (OtherOrder, "data", 10, "the data order is not restored"),
        (Prefetches, "data", 10, "of steps(Prefetcher) differs"),
        (OtherAugmentation, "data", 10, "batch['x'] of steps(DataLoader) differs"),
        (EvaluatesAtItsStart, "random state", 11, "an evaluation outside of sess.evaluating()"),
        (OtherRate, "hyperparameters", 10, "optimizer.lr 0.0100000 then, 0.0200000 now"),
        (KeepsSomethingForItself, "computation", 10, "depends on something that is not saved"),
        (
            ComputesDifferently,
            "computation",
            12,
            "random state the same, batch the same, hyperparameters the same, loss",
        ),
        (AppliesGradientsLater, "computation", 11, "depends on something that is not saved"),
        (ChangesTheModel, "state", 10, "state optimizer the same"),
    ],
    ids=lambda one: one.__name__ if isinstance(one, type) else "",
)
def test_the_cause_of_a_resume_that_is_not_exact_is_named(
    tmp_path: Path, kind: type[Program], cause: str, at: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_digests, "STATE_EVERY", 5)
    found = crash_and_go_on(tmp_path, kind)
    assert found is not None
    assert (found["outcome"], found["cause"], found["differs_at"]) == ("differs", cause, at)
    assert said in found["message"]


def test_an_augmentation_leaves_the_items_the_same(tmp_path: Path) -> None:
    found = crash_and_go_on(tmp_path, OtherAugmentation)
    assert found is not None
    assert "batch['y'] the same" in found["message"]
    assert "an augmentation draws random numbers that are not saved" in found["message"]


# --- what is digested ---


def test_each_bit_of_a_tensor_counts_whatever_it_holds() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn):
        zeros = torch.zeros(6, 3).to(dtype)
        other = zeros.clone()
        other.view(torch.uint8).reshape(-1)[-1] = 1
        assert bytes(tensor_bytes(zeros)) != bytes(tensor_bytes(other))
    assert bytes(tensor_bytes(torch.arange(6).reshape(2, 3).t())) != bytes(tensor_bytes(torch.arange(6)))
    assert bytes(tensor_bytes(torch.ones((), requires_grad=True))) == bytes(tensor_bytes(torch.ones(1)))
    assert bytes(tensor_bytes(torch.ones(0, 3))) == b""
    assert tensor_bytes(torch.ones(2, 2).to_sparse()) is None
    assert tensor_bytes(torch.ones(2, device="meta")) is None


def test_hyperparameters_are_named_by_optimizer_and_group() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    adam = torch.optim.AdamW([{"params": weights[:1], "lr": 0.5}, {"params": weights[1:2]}], lr=0.1)
    found = hyperparameters([("adam", adam), ("sgd", torch.optim.SGD(weights[2:], lr=torch.tensor(0.25)))])
    assert (found["adam[0].lr"], found["adam[1].lr"], found["sgd.lr"]) == (0.5, 0.1, 0.25)
    assert found["adam[0].betas[1]"] == 0.999


def test_a_summary_whose_names_are_no_texts_stops_no_run(tmp_path: Path) -> None:
    """Its numbers are read for the guard, under the names that the program gives."""
    model = torch.nn.Linear(1, 1)
    guarding = Guarding(nan_guard="stop")
    sv = Supervisor({"model": model}, str(tmp_path), guarding=guarding)
    with sv.managed_session() as sess:
        for _ in sess.steps(max_steps=2):
            sess.summary({0: torch.tensor(0.5), "loss": 1.0})  # type: ignore[dict-item]

    records = [one for one in trace.read(tmp_path) if isinstance(one, Record)]
    assert [one.values for one in records if one.kind == "numbers"] == [{"0": 0.5, "loss": 1.0}] * 2
