"""PyTorch programs, each run in a process of its own: see ``zygote.py``."""

from __future__ import annotations

from typing import Any

import states_at_end
import torch
import torch._dynamo  # once, for all children: the first optimizer imports it
import torch.utils.tensorboard

from stepguard import Stopping
from stepguard.torch import Supervisor


def ends_in(state: str, logdir: str) -> None:
    """End in one of the states of ``states_at_end.py``."""
    torch.set_num_threads(1)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir, stopping=Stopping(stop_grace_secs=2))

    def step(session: Any) -> None:
        with session.step():
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    states_at_end.end(state, sv, sv.prepare_or_wait_for_session, sv.managed_session, step)
