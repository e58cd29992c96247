"""The NaN guard on PyTorch: the data and the random states go on, the rest goes back."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stepguard import NonFiniteError
from stepguard.options import Guarding
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor, Values
from stepguard.torch.checkpoint.snapshot import non_finite

NAN = math.nan
EVERY_FIFTH = {"save_summaries_secs": 0, "save_model_secs": 0, "save_model_steps": 5}


class Line:
    """A line through noise. One of its batches makes it NaN, once."""

    def __init__(self, logdir: Path, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Linear(1, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer)
        self.progress = Values(lowest=math.inf)
        self.noise = torch.Generator().manual_seed(4)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        self.loader = DataLoader(TensorDataset(torch.arange(200.0)[:, None] / 200), batch_size=2, shuffle=True)
        state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "progress": self.progress,
            "noise": self.noise,
            "scaler": self.scaler,
        }
        self.sv = Supervisor(state, logdir, **{**EVERY_FIFTH, **options})
        self.seen: list[tuple[int, list[float], float, float]] = []

    def step(self, session: Any, inputs: torch.Tensor, *, is_bad: bool = False) -> None:
        drawn = torch.rand((), generator=self.noise)
        self.seen.append((session.global_step, inputs[:, 0].tolist(), float(drawn), random.random()))
        loss = ((self.model(inputs) - 3 * inputs) ** 2).mean() * (NAN if is_bad else 1.0)
        # The gradients are left where they are: of the step before a return they are NaN.
        self.scaler.scale(loss).backward()
        self.optimizer.step()
        self.scheduler.step(0.0)
        session.summary({"loss": loss})

    def wait_until_saved(self) -> None:
        assert self.sv._saving.writer.drain(20)


def committed(logdir: Path) -> list[int | None]:
    return sorted(one.step for one in CheckpointStore(logdir).candidates())


def test_the_model_goes_back_and_the_data_goes_on(tmp_path):
    line = Line(tmp_path, guarding=Guarding(nan_guard="return"))
    with line.sv.managed_session() as session:
        for number, (inputs,) in enumerate(session.steps(line.loader, max_steps=12)):
            if number == 7:
                line.wait_until_saved()
                at_five = CheckpointStore(tmp_path).newest_good().checkpoint
            if number == 8:
                # The very step after the bad one is of the model put back, before it has trained.
                assert session.global_step == 5
                saved = torch.load(at_five.path / "model.pt", weights_only=True)
                assert all(torch.equal(live, saved[name]) for name, live in line.model.state_dict().items())
                saved = torch.load(at_five.path / "optimizer.pt", weights_only=True)
                assert line.optimizer.state_dict()["state"][0]["step"] == saved["state"][0]["step"] == 5
                assert line.model.weight.grad is None
            line.step(session, inputs, is_bad=number == 7)

    assert [step for step, *_ in line.seen] == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11]
    # No batch is seen twice, and no random number is drawn twice.
    for column in (1, 2, 3):
        column_seen = [str(one[column]) for one in line.seen]
        assert len(set(column_seen)) == len(column_seen)
    assert committed(tmp_path)[-1] == 12
    assert all(bool(part.isfinite().all()) for part in line.model.parameters())


def test_a_run_that_was_put_back_is_resumed_like_any_other(tmp_path):
    line = Line(tmp_path, guarding=Guarding(nan_guard="return"))
    with line.sv.managed_session() as session:
        for number, (inputs,) in enumerate(session.steps(line.loader, max_steps=10)):
            if number == 6:
                line.wait_until_saved()
            line.step(session, inputs, is_bad=number == 6)
    again = Line(tmp_path, guarding=Guarding(nan_guard="return"))
    with again.sv.managed_session() as session:
        for (inputs,) in session.steps(again.loader, max_steps=13):
            again.step(session, inputs)

    assert [step for step, *_ in again.seen] == [10, 11, 12]
    batches = [str(batch) for _, batch, *_ in (*line.seen, *again.seen)]
    assert len(set(batches)) == len(batches) == 15


def test_a_loop_whose_last_step_was_bad_does_it_again(tmp_path):
    line = Line(tmp_path, guarding=Guarding(nan_guard="return"))
    with line.sv.managed_session() as session:
        for number, (inputs,) in enumerate(session.steps(line.loader, max_steps=8)):
            if number == 7:
                line.wait_until_saved()
            line.step(session, inputs, is_bad=number == 7)

    assert [step for step, *_ in line.seen] == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7]
    assert committed(tmp_path)[-1] == 8


def test_a_bad_loss_ends_the_loop(tmp_path):
    line = Line(tmp_path, guarding=Guarding(nan_guard="stop"))
    with pytest.raises(NonFiniteError, match="loss is nan at step 2"), line.sv.managed_session() as session:
        for inputs, *_ in session.steps(line.loader):
            line.step(session, inputs, is_bad=session.global_step == 2)

    assert len(line.seen) == 3
    assert committed(tmp_path) == []


@pytest.mark.parametrize("by", ["summaries", "summary_computed"])
def test_other_summaries_are_looked_at_too(by, tmp_path):
    model = torch.nn.Linear(1, 1)
    service = {"summaries": lambda: {"norm": torch.tensor(math.inf)}, "save_summaries_secs": 0.01}
    options = service if by == "summaries" else {"save_summaries_secs": 0}
    sv = Supervisor({"model": model}, tmp_path, guarding=Guarding(nan_guard="stop"), save_model_secs=0, **options)
    with pytest.raises(NonFiniteError, match="norm is inf"), sv.managed_session() as session:
        for _ in session.steps():
            if by == "summary_computed":
                sv.summary_computed(session, {"fine": 1, "norm": math.inf})


def test_a_summary_is_looked_at_without_a_logdir(tmp_path):
    sv = Supervisor({"model": torch.nn.Linear(1, 1)}, guarding=Guarding(nan_guard="stop"))
    with pytest.raises(NonFiniteError, match="loss is nan"), sv.managed_session() as session:
        for _ in session.steps():
            session.summary({"loss": torch.tensor(NAN)})


def test_several_processes_can_stop_and_not_return(tmp_path, monkeypatch):
    monkeypatch.setattr("stepguard.torch.supervisor.world", lambda: (1, 2))
    with pytest.raises(ValueError, match="for a run of one process"):
        Supervisor({"model": torch.nn.Linear(1, 1)}, tmp_path, guarding=Guarding(nan_guard="return"))


class TestWhatIsNotFinite:
    @pytest.mark.parametrize(
        "dtype",
        [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e5m2],
    )
    @pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
    def test_in_a_tensor_of_any_type_of_floats(self, dtype, bad):
        good = torch.zeros(4, 3)
        assert non_finite("a", {"x": [good.to(dtype)]}) == []
        good[2, 1] = bad
        assert non_finite("a", {"x": [good.to(dtype)]}) == ["a.x[0]"]

    @pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
    def test_in_a_sparse_tensor(self):
        sparse = torch.sparse_coo_tensor([[0, 2]], [1.0, NAN], (4,))
        assert non_finite("a", {"x": sparse, "y": torch.eye(2).to_sparse_csr()}) == ["a.x"]

    def test_and_what_is_nothing_of_the_kind(self):
        state = {"none": torch.zeros(0), "count": torch.arange(3), "name": "nan", "worst": math.inf, "flag": True}
        assert non_finite("a", state) == []
        assert non_finite("a", {"mean": NAN}) == ["a.mean"]
