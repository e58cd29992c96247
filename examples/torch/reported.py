"""A run with a history, and the report of it: crashes, a damaged checkpoint, the best ones, steps done again.

    python examples/torch/reported.py -o report.html

It needs `pip install 'stepguard[torch,report]'`.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stepguard import Saving, Watching
from stepguard.torch import Supervisor

sys.path.append(str(Path(__file__).parent.parent))
import digits_data

STEPS = 1200


def train(logdir, max_steps, kill_at=None, once_saved=None):
    """One start of the program. It trains up to a step, or kills itself at one."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    digits, test = digits_data.load()

    def as_tensors(found):
        return torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.labels).long()

    loader = DataLoader(TensorDataset(*as_tensors(digits)), batch_size=32, shuffle=True)
    test_images, test_labels = as_tensors(test)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sv = Supervisor(
        {"model": model, "optimizer": optimizer},
        logdir,
        save_model_secs=0,
        save_model_steps=100,
        saving=Saving(keep_best=("test_loss", "min", 2), save_at_end=True),
        watching=Watching(trace="batches", total_steps=STEPS),
    )
    with sv.managed_session() as sess:
        for x, y in sess.steps(loader, max_steps=max_steps):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sess.summary({"loss": loss})
            if sess.global_step == kill_at:
                # Not while that checkpoint is being written: the next start would finish it, and find no damage.
                deadline = time.monotonic() + 30
                while not Path(logdir, f"model.ckpt-{once_saved}.manifest.json").exists():
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            if sess.global_step % 100 == 50:
                with sess.evaluating(), torch.no_grad():
                    model.eval()
                    scores = model(test_images)
                    model.train()
                test_loss = nn.functional.cross_entropy(scores, test_labels).item()
                sess.metrics({"test_loss": test_loss})
                sess.summary({"test/loss": test_loss, "test/errors": (scores.argmax(1) != test_labels).sum().item()})
            if sess.global_step == 210:
                sess.save(name="before-the-crash")


def start(*arguments, **options):
    """Run `train` in a process of its own. Returns the exit code."""
    # Forked, so that PyTorch is imported once for all starts.
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments, kwargs=options)
    process.start()
    process.join()
    return process.exitcode


def flip_a_bit_of_the_newest(logdir):
    """Damage a checkpoint, as a disk might."""
    newest = max(Path(logdir).glob("model.ckpt-*/model.pt"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default="report.html", help="the report (default: %(default)s)")
    parser.add_argument("--logdir", default="runs/reported", help="emptied first (default: %(default)s)")
    args = parser.parse_args()
    shutil.rmtree(args.logdir, ignore_errors=True)
    start(args.logdir, STEPS, kill_at=433, once_saved=400)
    start(args.logdir, STEPS, kill_at=871, once_saved=851)
    flip_a_bit_of_the_newest(args.logdir)
    if code := start(args.logdir, STEPS):
        sys.exit(f"the last start ended with {code}")
    command = [sys.executable, "-m", "stepguard", "report", args.logdir, "-o", args.output]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
