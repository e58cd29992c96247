"""Real programs with every kind of loader, stopped in every way: the resumed run is the same run, or was refused.

    python tests/soak/loader_matrix.py --workers 0 2 persistent --stops kill term int
    python tests/soak/loader_matrix.py --kinds shuffled "a stream" --stops kill --places step

Each cell trains a model with dropout in a process of its own, stops it once by SIGKILL, SIGTERM or Ctrl-C, in a step,
in an evaluation, between two loops or at the last batch of an epoch, starts it again, and compares the batches and the
final weights with those of a run that nobody stopped. It prints what each cell is, and exits with 1 if one is "other".
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "torch"))

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
PLACES = ("step", "last batch", "evaluation", "between")
WORKERS = {"0": (0, False), "2": (2, False), "persistent": (2, True)}
EPOCHS = 3


def train(kind: str, workers: str, logdir: str, stop: str, place: str, epoch: int) -> None:
    """One process: it stops itself by a signal at the place, if ``stop`` names one."""
    import numpy as np
    import torch
    from loader_kinds import BATCHES, KINDS, ONE_TIME

    from stepguard.torch import Supervisor

    torch.set_num_threads(1)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.4), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = None if kind in ONE_TIME else KINDS[kind](*WORKERS[workers])
    lines = Path(logdir).with_suffix(".batches").open("a")

    def at(where: str, step: int) -> None:
        if (
            stop in SIGNALS
            and where == place
            and step == epoch * BATCHES + {"step": 2, "last batch": BATCHES - 1}.get(where, BATCHES)
        ):
            # Not before a checkpoint of an earlier step is there, or nothing would be resumed.
            deadline = time.monotonic() + 20
            while not list(Path(logdir).glob("*.manifest.json")) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), SIGNALS[stop])

    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir, save_model_secs=0.05, save_summaries_secs=0)
    with sv.managed_session() as sess:
        if loader is None:
            loader = KINDS[kind](*WORKERS[workers])
        for _ in sess.epochs(1 if kind in ONE_TIME else EPOCHS):
            for batch in sess.steps(loader):
                text = hashlib.sha256(repr(plain(batch)).encode()).hexdigest()
                optimizer.zero_grad()
                model(torch.full((2, 1), int(text[:4], 16) / 65536)).square().mean().backward()
                optimizer.step()
                lines.write(f"{sess.global_step} {text}\n")
                lines.flush()
                time.sleep(0.01)
                at("step", sess.global_step)
                at("last batch", sess.global_step)
            with sess.evaluating():
                torch.rand(3)
                at("evaluation", sess.global_step)
            at("between", sess.global_step)
    print(json.dumps([one.tolist() for one in model.parameters()]))


def plain(batch: object) -> object:
    if isinstance(batch, dict):
        return {key: plain(one) for key, one in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(one) for one in batch]
    return batch.tolist() if hasattr(batch, "tolist") else batch


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "--train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def batches(logdir: Path) -> dict[str, str]:
    """The last batch of each step: a step after the checkpoint is done again."""
    return dict(line.split(" ", 1) for line in logdir.with_suffix(".batches").read_text().splitlines())


def cell(folder: Path, whole: tuple[str, dict[str, str]], *, kind: str, workers: str, stop: str, place: str) -> str:
    """What became of a run that was stopped once: "same", "refused" or what else."""
    logdir = folder / "stopped"
    epoch = "0" if kind in ("zip", "enumerate") else "1"
    first = run(kind, workers, str(logdir), stop, place, epoch)
    second = run(kind, workers, str(logdir), "no", place, epoch)
    if second.returncode and "CheckpointMismatchError" in second.stderr:
        return "refused"
    if second.returncode:
        return f"failed: {first.stderr[-500:]} {second.stderr[-1500:]}"
    return "same" if (second.stdout.splitlines()[-1], batches(logdir)) == whole else "OTHER"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--workers", nargs="*", default=list(WORKERS), choices=WORKERS)
    parser.add_argument("--stops", nargs="*", default=list(SIGNALS), choices=SIGNALS)
    parser.add_argument("--places", nargs="*", default=list(PLACES), choices=PLACES)
    options = parser.parse_args()
    if options.train:
        train(*options.train[:5], int(options.train[5]))
        return
    from loader_kinds import KINDS

    found: dict[str, int] = {}
    for kind, workers in itertools.product(options.kinds or KINDS, options.workers):
        folder = Path(tempfile.mkdtemp())
        uninterrupted = run(kind, workers, str(folder / "whole"), "no", "step", "0")
        assert uninterrupted.returncode == 0, uninterrupted.stderr
        whole = uninterrupted.stdout.splitlines()[-1], batches(folder / "whole")
        for stop, place in itertools.product(options.stops, options.places):
            shutil.rmtree(folder / "stopped", ignore_errors=True)
            (folder / "stopped.batches").unlink(missing_ok=True)
            became = cell(folder, whole, kind=kind, workers=workers, stop=stop, place=place)
            print(f"{kind}, workers {workers}, {stop} in {place}: {became}", flush=True)
            found[became.split(":")[0]] = found.get(became.split(":")[0], 0) + 1
        shutil.rmtree(folder)
    print(json.dumps(found))
    sys.exit(1 if set(found) - {"same", "refused"} else 0)


if __name__ == "__main__":
    main()
