"""PyTorch programs, each run in a process of its own: see ``zygote.py``."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import states_at_end
import torch
import torch._dynamo  # once, for all children: the first optimizer imports it
import torch.utils.tensorboard
from zygote import report

from stepguard import Stopping
from stepguard.torch import Supervisor


def ends_in(state: str, logdir: str) -> None:
    """End in one of the states of ``states_at_end.py``."""
    torch.set_num_threads(1)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir, stopping=Stopping(stop_grace_secs=5))

    def step(session: Any) -> None:
        with session.step():
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    states_at_end.end(state, sv, sv.prepare_or_wait_for_session, sv.managed_session, step)


def evaluates(logdir: str, place: str, secs: float, is_told: bool) -> None:
    """Train three epochs of five steps; in the second evaluate, in the last step or after the loop.

    The evaluation lasts for so long after the file LOGDIR/told is there, or not at all for 0 s.
    """
    torch.set_num_threads(1)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    loader = torch.utils.data.DataLoader(torch.ones(5, 1))
    sv = Supervisor({"model": model}, logdir, save_summaries_secs=0, stopping=Stopping(stop_grace_secs=2))

    def evaluate(session: Any) -> None:
        kept = model.weight.detach().clone()
        model.weight.data.fill_(-1000.0)
        with session.evaluating() if is_told else contextlib.nullcontext():
            report("evaluating")
            while secs and not os.path.exists(f"{logdir}/told"):
                time.sleep(0.01)
            time.sleep(secs)
        model.weight.data.copy_(kept)

    with sv.managed_session() as session:
        report("begins", step=session.global_step, weight=model.weight.item())
        for epoch in session.epochs(3):
            for _ in session.steps(loader):
                with torch.no_grad():
                    model.weight += 1.0
                if place == "step" and epoch == 1 and session.is_last_batch:
                    evaluate(session)
            if place == "between" and epoch == 1:
                evaluate(session)
            report("end", epoch=epoch)
