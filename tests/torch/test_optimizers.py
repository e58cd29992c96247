"""Every optimizer and every scheduler of PyTorch goes on as if it had not been stopped."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from stepguard.torch import Supervisor
from stepguard.torch.checkpoint.snapshot import CopyStreams, HostMemory

STEPS, STOP = 6, 3

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}

SCHEDULERS = {
    name: kind
    for name, kind in vars(schedulers).items()
    if inspect.isclass(kind) and issubclass(kind, schedulers.LRScheduler) and not name.endswith("LRScheduler")
}

MultiStep = partial(schedulers.MultiStepLR, milestones=[2, 4, 4])


def in_sequence(optimizer, milestones=(2,)):
    parts = [schedulers.ConstantLR(optimizer), schedulers.MultiStepLR(optimizer, [1, 3])]
    return schedulers.SequentialLR(optimizer, parts, list(milestones))


WITH_ARGUMENTS = {
    "ChainedScheduler": lambda optimizer: schedulers.ChainedScheduler(
        [MultiStep(optimizer), schedulers.ExponentialLR(optimizer, 0.9)]
    ),
    "CosineAnnealingLR": partial(schedulers.CosineAnnealingLR, T_max=4),
    "CosineAnnealingWarmRestarts": partial(schedulers.CosineAnnealingWarmRestarts, T_0=2),
    "CyclicLR": partial(schedulers.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "ExponentialLR": partial(schedulers.ExponentialLR, gamma=0.9),
    "LambdaLR": partial(schedulers.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "MultiStepLR": MultiStep,
    "MultiplicativeLR": partial(schedulers.MultiplicativeLR, lr_lambda=lambda _: 0.9),
    "OneCycleLR": partial(schedulers.OneCycleLR, max_lr=0.1, total_steps=10),
    "ReduceLROnPlateau": partial(schedulers.ReduceLROnPlateau, patience=1),
    "SequentialLR": in_sequence,
    "StepLR": partial(schedulers.StepLR, step_size=2),
}


class Training:
    def __init__(self, optimizer, scheduler=None):
        torch.manual_seed(1)
        if optimizer is torch.optim.SparseAdam:
            self.model, self.inputs = nn.Embedding(4, 3, sparse=True), torch.tensor([1, 3])
        else:
            # Muon takes matrices only.
            self.model, self.inputs = nn.Linear(3, 2, bias=False), torch.ones(4, 3)
        self.optimizer = optimizer(self.model.parameters(), lr=0.05)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)

    def state(self):
        state = {"model": self.model, "optimizer": self.optimizer}
        return state if self.scheduler is None else {**state, "scheduler": self.scheduler}

    def loss(self):
        self.optimizer.zero_grad()
        loss = self.model(self.inputs).pow(2).mean()
        loss.backward()
        return loss

    def step(self):
        self.optimizer.step(self.loss)
        if isinstance(self.scheduler, schedulers.ReduceLROnPlateau):
            self.scheduler.step(1.0)
        elif self.scheduler is not None:
            self.scheduler.step()

    def run(self, logdir, steps):
        sv = Supervisor(self.state(), logdir, save_summaries_secs=0, save_model_secs=3600)
        with sv.managed_session() as session:
            self.began_at = session.global_step
            for _ in session.steps(max_steps=steps):
                self.step()
        return self


def written(training):
    """The whole state, with the type of each part of it: a Counter is not a dictionary."""
    return {name: described(one.state_dict()) for name, one in training.state().items()}


def described(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return type(value), {key: described(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [described(part) for part in value]
    return type(value), value


def check_goes_on(build, logdir):
    whole = build()
    for _ in range(STOP):
        whole.step()
    build().run(logdir, STOP)
    restored = build().run(logdir, STOP)
    assert restored.began_at == STOP
    assert written(restored) == written(whole)

    for _ in range(STEPS - STOP):
        whole.step()
    assert written(build().run(logdir, STEPS)) == written(whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer(name, tmp_path):
    check_goes_on(lambda: Training(OPTIMIZERS[name]), tmp_path)


@pytest.mark.filterwarnings("ignore:Please also save or load the state of the optimizer")
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step\\(\\)`")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler(name, tmp_path):
    scheduler = WITH_ARGUMENTS.get(name, SCHEDULERS[name])
    check_goes_on(lambda: Training(partial(torch.optim.SGD, momentum=0.9), scheduler), tmp_path)


class Trainer:
    def __init__(self, **parts):
        self.parts = parts

    def state_dict(self):
        return {name: one.state_dict() for name, one in self.parts.items()}

    def load_state_dict(self, state):
        for name, one in self.parts.items():
            one.load_state_dict(state[name])


@pytest.mark.parametrize("is_held", [False, True])
def test_a_scheduler_that_comes_first_after_a_restart_is_not_too_early(is_held, tmp_path, recwarn):
    for _ in range(2):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        parts = {"optimizer": optimizer, "scheduler": scheduler}
        state = {"model": model, **({"trainer": Trainer(**parts)} if is_held else parts)}
        with contextlib.suppress(ZeroDivisionError), Supervisor(state, tmp_path).managed_session() as session:
            for _ in session.epochs(1):
                for _ in session.steps(range(3)):
                    model(torch.ones(1, 1)).sum().backward()
                    optimizer.step()
                session.save()
                if session.boundary.steps:
                    raise ZeroDivisionError
                scheduler.step()

    assert scheduler.last_epoch == 1
    assert not [str(one.message) for one in recwarn if "lr_scheduler" in str(one.message)]


def test_a_counter_stays_one_in_a_snapshot_and_beside_sharded_tensors():
    from stepguard.torch.checkpoint import sharded_tensors

    counted = {"milestones": Counter({4: 2, 2: 1})}
    copied = HostMemory().copy("scheduler", counted, CopyStreams({}))
    skeleton = sharded_tensors.skeleton("scheduler", counted)

    assert copied == skeleton == counted
    assert type(copied["milestones"]) is type(skeleton["milestones"]) is Counter
    assert copied["milestones"] is not counted["milestones"]
