"""A small DistributedDataParallel run for ``torchrun``, each process of which notes the batches that it has seen."""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from training import Augmented

from stepguard.torch import Supervisor


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--logdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-steps", type=int)
    parser.add_argument("--step-secs", type=float, default=0.005)
    parser.add_argument("--kill", action="append", default=[], help="RANK:STEP, SIGKILL of itself")
    parser.add_argument("--nan", help="RANK:STEP, a loss that is not finite; its guard ends the run")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = Augmented()
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=True), num_workers=0)
    sv = Supervisor(
        {"model": model, "optimizer": optimizer},
        args.logdir,
        save_summaries_secs=0,
        save_model_secs=0 if args.save_steps else 0.05,
        save_model_steps=args.save_steps,
        nan_guard="stop" if args.nan else None,
    )
    seen = args.logdir.with_suffix(f".seen-{rank}")
    with sv.managed_session() as session:
        for index, inputs, targets in session.steps(loader, max_steps=args.steps):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            if args.nan:
                session.summary({"loss": float("nan") if f"{rank}:{session.global_step}" == args.nan else 0.0})
            time.sleep(args.step_secs)
            with seen.open("a") as lines:
                lines.write(f"{session.global_step} {index.tolist()}\n")
            if f"{rank}:{session.global_step}" in args.kill:
                os.kill(os.getpid(), signal.SIGKILL)
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in net.state_dict().values())).hexdigest()
    args.logdir.with_suffix(f".outcome-{rank}").write_text(f"{session.global_step} {digest} {random.random()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
