"""Real programs with every kind of loader, stopped in every way: the resumed run is the same run, or was refused.

    python tests/soak/loader_matrix.py --workers 0 2 persistent --stops kill term int
    python tests/soak/loader_matrix.py --kinds shuffled "a stream" --stops kill --places step

Each cell trains a model with dropout in a process of its own, stops it once by SIGKILL, SIGTERM or Ctrl-C, in a step,
in an evaluation, between two loops or at the last batch of an epoch, starts it again, and compares the batches and the
final weights with those of a run that nobody stopped. It prints what each cell is, and exits with 1 if one is "other".
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "torch"), str(HERE.parent / "process")]

from forked import begin, fork  # noqa: E402

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
PLACES = ("step", "last batch", "evaluation", "between")
WORKERS = {"0": (0, False), "2": (2, False), "persistent": (2, True)}
EPOCHS = 3


def train(kind: str, workers: str, logdir: str, stop: str, place: str, epoch: int) -> None:
    """One process: it stops itself by a signal at the place, if ``stop`` names one."""
    begin(f"{logdir}.output")
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


def run(kind: str, workers: str, logdir: Path, stop: str, place: str, epoch: int) -> tuple[int | None, str]:
    """The exit code of a process, None if it has not ended in five minutes, and what it has printed."""
    Path(f"{logdir}.output").unlink(missing_ok=True)
    process = fork(train, kind, workers, str(logdir), stop, place, epoch)
    process.join(300)
    process.kill()
    return process.exitcode, Path(f"{logdir}.output").read_text()


def batches(logdir: Path) -> dict[str, str]:
    """The last batch of each step: a step after the checkpoint is done again."""
    return dict(line.split(" ", 1) for line in logdir.with_suffix(".batches").read_text().splitlines())


def cell(folder: Path, whole: tuple[str, dict[str, str]], *, kind: str, workers: str, stop: str, place: str) -> str:
    """What became of a run that was stopped once: "same", "refused" or what else."""
    logdir = folder / f"{stop}-{place.replace(' ', '-')}"
    epoch = 0 if kind in ("zip", "enumerate") else 1
    _, said = run(kind, workers, logdir, stop, place, epoch)
    code, output = run(kind, workers, logdir, "no", place, epoch)
    if code and "CheckpointMismatchError" in output:
        return "refused"
    if code != 0:
        return f"failed with {code}: {said[-500:]} {output[-1500:]}"
    return "same" if (output.splitlines()[-1], batches(logdir)) == whole else "OTHER"


def cells(options: argparse.Namespace, kind_and_workers: tuple[str, str]) -> list[str]:
    """What became of all the runs with one kind of loader."""
    kind, workers = kind_and_workers
    folder = Path(tempfile.mkdtemp())
    code, output = run(kind, workers, folder / "whole", "no", "step", 0)
    assert code == 0, output
    whole = output.splitlines()[-1], batches(folder / "whole")
    found = []
    for stop, place in itertools.product(options.stops, options.places):
        found.append(cell(folder, whole, kind=kind, workers=workers, stop=stop, place=place))
        print(f"{kind}, workers {workers}, {stop} in {place}: {found[-1]}", flush=True)
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--workers", nargs="*", default=list(WORKERS), choices=WORKERS)
    parser.add_argument("--stops", nargs="*", default=list(SIGNALS), choices=SIGNALS)
    parser.add_argument("--places", nargs="*", default=list(PLACES), choices=PLACES)
    parser.add_argument("--jobs", type=int, default=2, help="kinds of loaders that are tried at the same time")
    options = parser.parse_args()
    from loader_kinds import KINDS

    found: dict[str, int] = {}
    with ThreadPoolExecutor(options.jobs) as jobs:
        tried = jobs.map(functools.partial(cells, options), itertools.product(options.kinds or KINDS, options.workers))
        for became in itertools.chain.from_iterable(tried):
            found[became.split(":")[0]] = found.get(became.split(":")[0], 0) + 1
    print(json.dumps(found))
    sys.exit(1 if set(found) - {"same", "refused"} else 0)


if __name__ == "__main__":
    main()
