"""Train a digit classifier with Hugging Face Accelerate under a Supervisor, in one process or in several:

    python examples/torch/digits_accelerate.py
    accelerate launch --cpu --num_processes 2 examples/torch/digits_accelerate.py

It needs `pip install accelerate`. What `prepare` returns goes to the Supervisor and to `sess.steps` as it is. Kill it
at any moment and start it again: it goes on from the newest checkpoint with the very next batch.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stepguard.torch import Supervisor

sys.path.append(str(Path(__file__).parent.parent))
import digits_data

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs/digits_accelerate", help="the same for all (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=30, help="train so many epochs in all (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=64, help="of each process (default: %(default)s)")
parser.add_argument(
    "--save-model-secs", type=float, default=1, help="seconds between checkpoints (default: %(default)s)"
)
args = parser.parse_args()

# Before the Supervisor is made: it asks torch.distributed which process this is.
accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)
torch.manual_seed(1)
train, test = digits_data.load()


def as_tensors(digits):
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.labels).long()


loader = DataLoader(TensorDataset(*as_tensors(train)), args.batch_size, shuffle=True)
test_images, test_labels = as_tensors(test)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)


def test_accuracy():
    model.eval()
    with torch.no_grad():
        right = accelerator.unwrap_model(model)(test_images).argmax(1) == test_labels
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
    accelerator.print(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch")

    for epoch in sess.epochs(args.epochs):
        for images, labels in sess.steps(loader):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
        accelerator.print(f"epoch {epoch + 1:3d} of {args.epochs}   loss {loss.item():.4f}", flush=True)

    weights = sum(parameter.double().sum() for parameter in model.parameters()).item()
    accelerator.print(f"test accuracy {test_accuracy():.2%}   sum of the weights {weights:.12f}")
accelerator.end_training()
