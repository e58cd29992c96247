"""A small run for ``torchrun``, each process of which notes the batches that it has seen.

The model is wrapped in DistributedDataParallel (ddp), or sharded by fully_shard (fsdp), or left alone (none).
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from training import Augmented

from stepguard.options import Guarding, Saving, Watching
from stepguard.torch import Session, Supervisor, Values

# Else tensorboard imports TensorFlow where it is installed, which takes longer than all steps.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--logdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--loop-steps", type=int, help="the steps of one of many loops; rank 0 evaluates after each")
    parser.add_argument("--epoch-ends", action="store_true", help="a loop over epochs, with work at the end of each")
    parser.add_argument("--kill-in-end", help="RANK:EPOCH, SIGKILL of itself, once, when the end was begun")
    parser.add_argument("--measures", action="store_true", help="hands over a metric at the end of each epoch")
    parser.add_argument("--save-steps", type=int)
    parser.add_argument("--awaits-saves", action="store_true", help="goes on once each checkpoint is committed")
    parser.add_argument("--step-secs", type=float, default=0.005)
    parser.add_argument("--wrap", choices=["ddp", "fsdp", "none"], default="ddp")
    parser.add_argument("--frozen", action="store_true", help="a large frozen parameter, which gets a file of its own")
    parser.add_argument("--kill", action="append", default=[], help="RANK:STEP, SIGKILL of itself, once")
    parser.add_argument("--kill-once-saved", type=int, help="not before a checkpoint after this step is committed")
    parser.add_argument("--full-disk", type=int, help="the rank of which the first write finds no room")
    parser.add_argument("--nan", help="RANK:STEP, a loss that is not finite; its guard ends the run")
    parser.add_argument("--leave", help="RANK:STEP:break, exit or break-first, in the middle of a loop that goes on")
    parser.add_argument("--join", help="the numbers of batches of each rank, which come to their ends under Join")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    if args.full_disk == rank:
        fill_disk_once()
    net = network()
    if args.frozen:
        add_frozen(net)
    model = wrapped(net, args.wrap)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if args.join:  # Whose updates do not depend on how many there were.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10**9 if args.join else 17)
    data = Augmented()
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=True), num_workers=0)
    mine = Values(per_process=True, rank=rank, items=0)
    sv = Supervisor(
        {"model": model, "optimizer": optimizer, "scheduler": scheduler, "mine": mine},
        args.logdir,
        save_model_secs=0 if args.save_steps else 0.05,
        save_model_steps=args.save_steps,
        saving=Saving(keep_best=("val_loss", "min", 2) if args.measures else None, frozen_apart=args.frozen),
        guarding=Guarding(nan_guard="stop" if args.nan else None),
        watching=Watching(trace="batches", save_summaries_secs=0),
    )
    seen = args.logdir.with_suffix(f".seen-{rank}")
    with sv.managed_session() as session, nullcontext() if args.epochs else joined(model, args):
        args.logdir.with_suffix(f".began-{rank}").write_text(f"{session.global_step} {digest(net, optimizer)}")

        def begin_epoch() -> None:
            mine.items += 1000 * (rank + 1)
            optimizer.param_groups[0]["weight_decay"] *= 0.7

        for index, inputs, targets in batches(session, loader, model, args, begin_epoch):
            if args.leave == f"{rank}:{session.global_step}:break-first":  # The other is in this step, and waits.
                break
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            session.summary({"loss of all" if args.nan else "loss": loss})
            scheduler.step()
            mine.items += sum(index.tolist())
            if args.nan:
                session.summary({"loss": float("nan") if f"{rank}:{session.global_step}" == args.nan else 0.0})
            time.sleep(args.step_secs)
            if args.awaits_saves and session.global_step and session.global_step % args.save_steps == 0:
                # A checkpoint that falls due while the writer has not done with the one before it would be skipped.
                # After a step that is not finite there is none.
                manifest = args.logdir / f"model.ckpt-{session.global_step}.manifest.json"
                while not (manifest.exists() and is_idle(sv)) and not sv.should_stop():
                    time.sleep(0.01)
            with seen.open("a") as lines:
                lines.write(f"{session.global_step} {index.tolist()}\n")
            if f"{rank}:{session.global_step}" in args.kill and is_new(session.global_step, seen):
                while args.kill_once_saved is not None and newest_step(args.logdir) <= args.kill_once_saved:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            if args.leave == f"{rank}:{session.global_step}:exit":
                sys.exit(7)
            if args.leave == f"{rank}:{session.global_step}:break":
                break
    # Not after SIGTERM, which ends one process: to put the weights together takes all.
    if session.global_step == args.steps or (args.join and args.epochs):
        outcome = f"{session.global_step} {digest(net, optimizer)}"
        args.logdir.with_suffix(f".outcome-{rank}").write_text(f"{outcome} {random.random()} {vars(mine)}")
        # Else the first to end may close its connections while another still reads from them.
        dist.barrier()
    dist.destroy_process_group()


def joined(model: torch.nn.Module, args: argparse.Namespace) -> AbstractContextManager[object]:
    if not args.join:
        return nullcontext()
    from torch.distributed.algorithms.join import Join

    return Join([model])


def batches(
    session: Session,
    loader: DataLoader,
    model: torch.nn.Module,
    args: argparse.Namespace,
    begin_epoch: Callable[[], None],
) -> Iterator[list[torch.Tensor]]:
    if args.join:
        count = int(args.join.split(",")[dist.get_rank()])
        inputs = [[torch.arange(4), torch.ones(4, 4), torch.ones(4, 1)]] * count
        if not args.epochs:
            yield from session.steps(inputs, epochs=1)
            return
        for _ in session.epochs(args.epochs):
            with joined(model, args):
                yield from session.steps(inputs)
        return
    if args.epoch_ends:
        for epoch in session.epochs(args.epochs):
            begin_epoch()
            yield from session.steps(loader)
            if args.measures:
                # The others are in the next loop then, and wait there for who evaluates.
                time.sleep(0.5 * (dist.get_rank() == 0))
                session.metrics({"val_loss": 10.0 - epoch})
            end_epoch(epoch, args)
        return
    if not args.loop_steps:
        yield from session.steps(loader, max_steps=args.steps, epochs=args.epochs)
    while args.loop_steps and session.global_step < args.steps:
        yield from session.steps(loader, max_steps=session.global_step + args.loop_steps)
        if dist.get_rank() == 0:
            args.logdir.with_suffix(".evaluating").touch()
            time.sleep(1)


def end_epoch(epoch: int, args: argparse.Namespace) -> None:
    """Draws, as an evaluation does, and goes on for long enough to be saved meanwhile."""
    rank = dist.get_rank()
    random.random()
    torch.rand(3)
    ends = args.logdir.with_suffix(f".ends-{rank}")
    with ends.open("a") as lines:
        lines.write(f"{epoch}\n")
    if args.kill_in_end == f"{rank}:{epoch}" and ends.read_text().split().count(str(epoch)) == 1:
        # The end of the others has begun as well: what ends this process ends them soon after.
        for one in range(dist.get_world_size()):
            others = args.logdir.with_suffix(f".ends-{one}")
            while not others.exists() or str(epoch) not in others.read_text().split():
                time.sleep(0.01)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)


def is_idle(sv: Supervisor) -> bool:
    """Whether nothing is written: after its manifest a checkpoint is recorded, and older ones are removed."""
    writer = sv._saving.writer
    return writer is None or not writer.busy


def newest_step(logdir: Path) -> int:
    return max([int(one.name.split("-")[1].split(".")[0]) for one in logdir.glob("model.ckpt-*.manifest.json")] or [-1])


def is_new(step: int, seen: Path) -> bool:
    return sum(line.startswith(f"{step} ") for line in seen.read_text().splitlines()) == 1


def network() -> torch.nn.Sequential:
    """Its last layer is too small for two processes: one of them has nothing of it."""
    return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))


def add_frozen(net: torch.nn.Sequential) -> None:
    """A part of it for each of two processes is large enough to be shared by checkpoints."""
    net[0].register_parameter("table", torch.nn.Parameter(torch.ones(1024, 640), requires_grad=False))


def fill_disk_once() -> None:
    from stepguard.torch.checkpoint import sharded_files

    write_parts = sharded_files.write_parts

    def fail(*_: object) -> None:
        sharded_files.write_parts = write_parts
        raise OSError(errno.ENOSPC, "No space left on device")

    sharded_files.write_parts = fail


def wrapped(net: torch.nn.Module, how: str) -> torch.nn.Module:
    if how == "ddp":
        return DistributedDataParallel(net)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net[0])
        fully_shard(net)
    return net


def digest(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of the weights and all that the optimizer keeps, whole, whatever part of it this process has."""
    tensors = list(net.state_dict().values())
    tensors += [one for state in optimizer.state_dict()["state"].values() for one in state.values()]
    whole = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in whole)).hexdigest()


if __name__ == "__main__":
    main()
    # About one of a hundred such processes was aborted by C++ when the interpreter went ("terminate called without an
    # active exception"), after all was done and the group was destroyed: that is no part of what is tested.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
