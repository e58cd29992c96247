"""A training of several processes, each of which has something that the others do not have, or not yet.

Each appends to a file of its own what it computes in its steps, bit for bit, and what it evaluates to before the first.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stepguard.options import Saving
from stepguard.torch import Supervisor, Values

sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--logdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--has", action="append", default=[])
    parser.add_argument("--own-loop", action="store_true")
    parser.add_argument("--unchecked", action="store_true", help="other processes go on in the middle of an epoch")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, has = dist.get_rank(), args.has
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 100), nn.BatchNorm1d(100), nn.Tanh(), nn.Linear(100, 1))
    average = copy.deepcopy(net)
    if "experts" in has:
        net[3].weight.data.fill_(rank + 1)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["3.weight", "3.bias"])
    model = DistributedDataParallel(net, broadcast_buffers="statistics" not in has)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    state = {"model": model, "optimizer": optimizer, "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 2)}
    generators = torch.Generator().manual_seed(rank), np.random.default_rng(rank), random.Random(rank)
    if "generators" in has:
        state |= dict(zip(("noise", "numpy", "python"), generators, strict=True))
    carried = Values(mean=0.0, last=None, history=[], seen=0)
    probe = nn.Linear(3, 1)
    slow = torch.optim.Adam(probe.parameters(), 0.1)
    state |= {"carried": carried, "average": average}
    if "probe" in has:
        state |= {"probe": probe, "probe.optimizer": slow}
    inputs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * n + rank)) for n in range(20)]
    # Where a loop of the program's own ends, it has not come back for a checkpoint.
    sv = Supervisor(
        state,
        args.logdir,
        save_model_secs=0,
        save_model_steps=3 if args.own_loop else None,
        saving=Saving(save_at_end=not args.own_loop),
        save_summaries_secs=0,
        summary_writer=None,
    )

    def note(what: str, *values: torch.Tensor) -> None:
        with args.logdir.with_suffix(f".noted-{rank}").open("a") as lines:
            lines.write(f"{what} {[value.tolist() for value in values]}\n")

    def train(batch: torch.Tensor) -> None:
        if "generators" in has:
            more = generators[1].random() + generators[2].random()
            batch = batch + more + torch.randn(batch.shape, generator=generators[0])
        each = (model(batch) - batch.sum(1, keepdim=True)) ** 2 * (1 + carried.mean)
        loss, other = each.mean(), probe(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if "probe" in has:
            slow.zero_grad()
            other.backward()
            slow.step()
        note(f"step {session.global_step}", loss, other)
        if "values" in has:
            carried.mean = 0.5 * each.mean().item()
            carried.last = {"loss": each.detach()}
        if rank == 0:
            carried.history.append(loss.item())
            with torch.no_grad():
                for mine, one in zip(average.parameters(), net.parameters(), strict=True):
                    mine.lerp_(one, 0.1)

    with sv.managed_session() as session:
        if args.own_loop:
            while session.global_step < args.steps:
                with session.step() as step:
                    train(inputs[step])
                carried.seen += 4
                state["schedule"].step()
        else:
            for batch in session.steps(
                inputs, max_steps=args.steps, resume_data="unchecked" if args.unchecked else True
            ):
                train(batch)
                carried.seen += 4
                state["schedule"].step()
        if "statistics" in has or "evaluation" in has:
            with session.evaluating(), torch.no_grad():
                net.eval()
                note(f"after {session.global_step}", net(torch.eye(3)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
