"""Train a small convolutional network on digits that are shifted and smudged at random, in several processes:

    torchrun --standalone --nproc-per-node=2 examples/torch/images.py

The loop has the form of most tutorials: epochs, an evaluation after each, and a learning rate for each epoch. Kill one
process or all of them at any moment and start the program again: every process goes on with its very next batch.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from stepguard.torch import Supervisor, Values

sys.path.append(str(Path(__file__).parent.parent))
import digits_data

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs/images", help="the same for all processes (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
parser.add_argument("--batch-size", type=int, default=32, help="of each process (default: %(default)s)")
parser.add_argument(
    "--workers", type=int, default=1, help="that load the data, for each process (default: %(default)s)"
)
parser.add_argument("--width", type=int, default=16, help="of the model (default: %(default)s)")
parser.add_argument(
    "--save-model-secs", type=float, default=5, help="seconds between checkpoints (default: %(default)s)"
)
args = parser.parse_args()


class Images(Dataset):
    """Digits of 8 x 8 pixels from 0 to 1, each changed at random by ``augment``."""

    def __init__(self, digits, augment=None):
        self.images = torch.from_numpy(digits.images).float().reshape(-1, 1, 8, 8) / 16
        self.labels = torch.from_numpy(digits.labels).long()
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        image = self.images[number]
        return image if self.augment is None else self.augment(image), self.labels[number]


def shift_and_smudge(image):
    """The image, moved by up to one pixel, with some noise and a hole of two by two pixels."""
    down, right = torch.randint(3, (2,)).tolist()
    moved = nn.functional.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
    smudged = moved + 0.05 * torch.randn(moved.shape)
    row, column = torch.randint(7, (2,)).tolist()
    smudged[:, row : row + 2, column : column + 2] = 0
    return smudged


def convolution(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


# Before the Supervisor is made: it asks torch.distributed which process this is.
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
torch.manual_seed(1 + rank)

train, test = digits_data.load()
train, test = Images(train, shift_and_smudge), Images(test)
sampler = DistributedSampler(train, drop_last=True)
loader = DataLoader(
    train, args.batch_size, sampler=sampler, num_workers=args.workers, persistent_workers=args.workers > 0
)

width = args.width
network = nn.Sequential(
    *(convolution(1, width), nn.MaxPool2d(2), convolution(width, 2 * width)),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 10)),
)
model = DistributedDataParallel(network)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.epochs - 2))
scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[2])
progress = Values(best_accuracy=0.0)


def say(text):
    """Once, and not by each process."""
    if rank == 0:
        print(text, flush=True)


@torch.no_grad()
def accuracy():
    # Not by the wrapper, which would wait for the other processes.
    network.eval()
    right = [network(images).argmax(1) == labels for images, labels in DataLoader(test, 128)]
    network.train()
    return torch.cat(right).float().mean().item()


state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "progress": progress}
sv = Supervisor(state, logdir=args.logdir, save_model_secs=args.save_model_secs)
with sv.managed_session() as sess:
    step = sess.global_step
    say(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch")

    for epoch in sess.epochs(args.epochs):
        for images, labels in sess.steps(loader):
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if sess.is_last_batch:
                sess.summary({"loss": loss})
        scheduler.step()
        if rank == 0:
            with sess.evaluating():
                found = accuracy()
            progress.best_accuracy = max(progress.best_accuracy, found)
            sess.summary({"test_accuracy": found})
            say(f"epoch {epoch} of {args.epochs}, step {sess.global_step}   test accuracy {found:.2%}")

    say(f"best test accuracy {progress.best_accuracy:.2%}")
dist.destroy_process_group()
