"""Train a digit classifier under a Supervisor in several processes, with DistributedDataParallel:

    torchrun --standalone --nproc-per-node=2 examples/torch/digits_ddp.py

Kill one process or all of them at any moment and start it again: it goes on from the newest checkpoint, every process
with its very next batch.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from stepguard.torch import Supervisor

sys.path.append(str(Path(__file__).parent.parent))
import digits_data

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs/digits_ddp", help="the same for all processes (default: %(default)s)")
parser.add_argument("--steps", type=int, default=2000, help="train up to this step (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=64, help="of each process (default: %(default)s)")
parser.add_argument(
    "--save-model-secs", type=float, default=1, help="seconds between checkpoints (default: %(default)s)"
)
args = parser.parse_args()

# Before the Supervisor is made: it asks torch.distributed which process this is.
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
torch.manual_seed(1 + rank)
train, test = digits_data.load()


def as_tensors(digits):
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.labels).long()


dataset = TensorDataset(*as_tensors(train))
loader = DataLoader(dataset, args.batch_size, sampler=DistributedSampler(dataset, shuffle=True, drop_last=True))
test_images, test_labels = as_tensors(test)

# DistributedDataParallel gives all processes the weights of rank 0.
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)


def say(text):
    """Once, and not by each process."""
    if rank == 0:
        print(text, flush=True)


def test_accuracy():
    model.eval()
    with torch.no_grad():
        # The module inside: what one process does alone must not wait for the others.
        right = model.module(test_images).argmax(1) == test_labels
    model.train()
    return right.float().mean().item()


sv = Supervisor(
    {"model": model, "optimizer": optimizer, "scheduler": scheduler},
    logdir=args.logdir,
    save_model_secs=args.save_model_secs,
    save_summaries_secs=0,
)
with sv.managed_session() as sess:
    step = sess.global_step
    say(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch")

    for images, labels in sess.steps(loader, max_steps=args.steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (sess.global_step + 1) % 200 == 0:
            sess.summary({"loss": loss})
            say(f"step {sess.global_step + 1:5d} of {args.steps}   loss {loss.item():.4f}")

    say(f"test accuracy {test_accuracy():.2%}")
dist.destroy_process_group()
