"""Train a digit classifier under a Supervisor, in one process.

Kill it at any moment and start it again: it goes on with the very next batch, and ends bit by bit where it would have.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stepguard import Watching
from stepguard.torch import Supervisor

sys.path.append(str(Path(__file__).parent.parent))
import digits_data

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/torch_digits", help="checkpoints and event files (default: %(default)s)")
parser.add_argument("--steps", type=int, default=3000, help="train up to this step (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--save-model-secs", type=int, default=1, help="seconds between checkpoints (default: %(default)s)")
parser.add_argument("--save-model-steps", type=int, help="steps between checkpoints, in addition")
args = parser.parse_args()

torch.manual_seed(1)
# The program draws nothing from these; seeded, two runs are the same to the last value that a checkpoint holds.
random.seed(1)
np.random.seed(1)
train, test = digits_data.load()


def as_tensors(digits):
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.labels).long()


loader = DataLoader(TensorDataset(*as_tensors(train)), args.batch_size, shuffle=True, drop_last=True)
test_images, test_labels = as_tensors(test)

# The model: 64 pixels, 128 hidden units, 10 digits.
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)


def test_accuracy():
    model.eval()
    with torch.no_grad():
        right = model(test_images).argmax(1) == test_labels
    model.train()
    return right.float().mean().item()


sv = Supervisor(
    {"model": model, "optimizer": optimizer, "scheduler": scheduler},
    logdir=args.logdir,
    save_model_secs=args.save_model_secs,
    save_model_steps=args.save_model_steps,
    save_summaries_secs=1,
    summaries=lambda: {"test_accuracy": test_accuracy()},
    # Steps that are done again after a crash are compared with the first time: their batches and random states, too.
    watching=Watching(trace="batches"),
)
with sv.managed_session() as sess:
    step = sess.global_step
    print(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch", flush=True)

    for images, labels in sess.steps(loader, max_steps=args.steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (sess.global_step + 1) % 500 == 0:
            sess.summary({"loss": loss})
            print(f"step {sess.global_step + 1:5d} of {args.steps}   loss {loss.item():.4f}", flush=True)

    print(f"test accuracy {test_accuracy():.2%}", flush=True)
