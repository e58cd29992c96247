"""Train a small character language model on the Constitution of the United States, and let it write.

It takes about half a minute on two cores. Kill it at any moment and start it again: it goes on with the very next
batch, and writes the same text in the end.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from stepguard.torch import Supervisor

TEXT_PATH = Path(__file__).parent.parent / "data" / "us-constitution.txt"
CONTEXT = 64

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/characters", help="checkpoints and event files (default: %(default)s)")
parser.add_argument("--steps", type=int, default=900, help="train up to this step (default: %(default)s)")
parser.add_argument(
    "--save-model-secs", type=float, default=1, help="seconds between checkpoints (default: %(default)s)"
)
parser.add_argument("--characters", type=int, default=400, help="how many to write (default: %(default)s)")
args = parser.parse_args()

torch.manual_seed(1)
text = TEXT_PATH.read_text(encoding="ascii")
alphabet = sorted(set(text))
numbers = {character: number for number, character in enumerate(alphabet)}
encoded = torch.tensor([numbers[character] for character in text])
train, held_out = encoded[:-4000], encoded[-4000:]


class Passages(Dataset):
    """Passages of ``CONTEXT`` characters from anywhere in a text, each with the character that follows each of them."""

    def __init__(self, text):
        self.text = text

    def __len__(self):
        return len(self.text) - CONTEXT

    def __getitem__(self, begin):
        passage = self.text[begin : begin + CONTEXT + 1]
        return passage[:-1], passage[1:]


class Characters(nn.Module):
    def __init__(self, width=160):
        super().__init__()
        self.embed = nn.Embedding(len(alphabet), 32)
        self.read = nn.GRU(32, width, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.predict = nn.Linear(width, len(alphabet))

    def forward(self, characters, memory=None):
        seen, memory = self.read(self.embed(characters), memory)
        return self.predict(self.drop(seen)), memory


loader = DataLoader(Passages(train), batch_size=32, shuffle=True, drop_last=True)
model = Characters()
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)


def loss_of(passages, following):
    predicted, _ = model(passages)
    return nn.functional.cross_entropy(predicted.flatten(0, 1), following.flatten())


def held_out_loss():
    model.eval()
    with torch.no_grad():
        loss = loss_of(held_out[None, :-1], held_out[None, 1:])
    model.train()
    return loss.item()


def write(beginning, count):
    """The model's own continuation. It draws from a generator of its own, and so does not disturb the training."""
    chance = torch.Generator().manual_seed(7)
    model.eval()
    written, memory = beginning, None
    next_in = torch.tensor([[numbers[character] for character in beginning]])
    with torch.no_grad():
        for _ in range(count):
            predicted, memory = model(next_in, memory)
            odds = torch.softmax(predicted[0, -1] / 0.7, 0)
            next_in = torch.multinomial(odds, 1, generator=chance)[None]
            written += alphabet[next_in.item()]
    model.train()
    return written


sv = Supervisor(
    {"model": model, "optimizer": optimizer, "scheduler": scheduler},
    logdir=args.logdir,
    save_model_secs=args.save_model_secs,
    save_summaries_secs=5,
    summaries=lambda: {"held_out_loss": held_out_loss()},
)
with sv.managed_session() as sess:
    step = sess.global_step
    print(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch", flush=True)

    for passages, following in sess.steps(loader, max_steps=args.steps):
        loss = loss_of(passages, following)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (sess.global_step + 1) % 100 == 0:
            sess.summary({"loss": loss})
            print(f"step {sess.global_step + 1:5d} of {args.steps}   loss {loss.item():.4f}", flush=True)

    print(f"held-out loss {held_out_loss():.3f} (one that knows nothing: {math.log(len(alphabet)):.3f})\n")
    print(write("The Congress shall have power", args.characters), flush=True)
