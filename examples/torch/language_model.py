"""Train a small GPT on the Constitution of the United States, as one trains a large one.

Gradients are accumulated over several batches, the forward pass runs in bfloat16 or float16, the learning rate warms up
and decays, and a moving average of the weights is evaluated after each epoch. Kill it at any moment and start it again:
it goes on with the very next batch, and ends bit by bit where it would have.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from stepguard.torch import Supervisor, Values

TEXT_PATH = Path(__file__).parent.parent / "data" / "us-constitution.txt"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/language", help="checkpoints and event files (default: %(default)s)")
parser.add_argument("--steps", type=int, default=200, help="train up to this step (default: %(default)s)")
parser.add_argument("--accumulate", type=int, default=4, help="batches to a step (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=12, help="passages in a batch (default: %(default)s)")
parser.add_argument("--context", type=int, default=64, help="characters in a passage (default: %(default)s)")
parser.add_argument("--width", type=int, default=64, help="of the model (default: %(default)s)")
parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
parser.add_argument(
    "--save-model-secs", type=float, default=5, help="seconds between checkpoints (default: %(default)s)"
)
args = parser.parse_args()

torch.manual_seed(1)
text = TEXT_PATH.read_text(encoding="ascii")
alphabet = sorted(set(text))
numbers = {character: number for number, character in enumerate(alphabet)}
encoded = torch.tensor([numbers[character] for character in text])
train, held_out = encoded[:-4000], encoded[-4000:]


class Passages(Dataset):
    """Each item is a passage that begins near its place in the text, and the same passage one character later."""

    def __init__(self, text):
        self.text = text

    def __len__(self):
        return len(self.text) // args.context - 2

    def __getitem__(self, number):
        begin = number * args.context + int(torch.randint(args.context, ()))
        passage = self.text[begin : begin + args.context + 1]
        return passage[:-1], passage[1:]


class GPT(nn.Module):
    def __init__(self, width, heads=4, layers=2):
        super().__init__()
        self.characters = nn.Embedding(len(alphabet), width)
        self.places = nn.Embedding(args.context, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.predict = nn.Linear(width, len(alphabet), bias=False)
        self.predict.weight = self.characters.weight
        nn.init.normal_(self.characters.weight, std=0.02)

    def forward(self, passages):
        size = passages.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size)
        embedded = self.characters(passages) + self.places(torch.arange(size))
        return self.predict(self.blocks(embedded, mask=mask, is_causal=True))


model = GPT(args.width)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
decayed = [one for one in model.parameters() if one.dim() > 1]
others = [one for one in model.parameters() if one.dim() <= 1]
optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
# Only float16 needs its losses scaled.
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=args.dtype == "float16")
loader = DataLoader(Passages(train), args.batch_size, shuffle=True)
steps_in_an_epoch = math.ceil(len(loader) / args.accumulate)


def learning_rate(step, highest=3e-3, warmup=20):
    """Linear up to ``highest``, then along a cosine down to a tenth of it."""
    if step < warmup:
        return highest * (step + 1) / warmup
    way = (step - warmup) / max(1, args.steps - warmup)
    return highest * (0.55 + 0.45 * math.cos(math.pi * way))


def loss_of(model, passages, following):
    with torch.autocast("cpu", getattr(torch, args.dtype), enabled=args.dtype != "float32"):
        predicted = model(passages)
    return nn.functional.cross_entropy(predicted.float().flatten(0, 1), following.flatten())


@torch.no_grad()
def held_out_loss():
    """The loss of the averaged weights."""
    ema.eval()
    losses = [loss_of(ema, passages, following) for passages, following in DataLoader(Passages(held_out), 16)]
    ema.train()
    return torch.stack(losses).mean().item()


progress = Values(lowest=math.inf)
state = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler, "progress": progress}
sv = Supervisor(state, logdir=args.logdir, save_model_secs=args.save_model_secs)
with sv.managed_session() as sess:
    step = sess.global_step
    print(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch", flush=True)

    for epoch in sess.epochs(math.ceil(args.steps / steps_in_an_epoch)):
        for passages, following in sess.steps(loader, max_steps=args.steps, accumulate=args.accumulate):
            loss = loss_of(model, passages, following)
            scaler.scale(loss / args.accumulate).backward()
            if sess.is_update:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(sess.global_step)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                ema.update_parameters(model)
                sess.summary({"loss": loss})
        with sess.evaluating():
            found = held_out_loss()
        progress.lowest = min(progress.lowest, found)
        sess.summary({"held_out_loss": found})
        print(f"epoch {epoch}, step {sess.global_step} of {args.steps}   held-out loss {found:.4f}", flush=True)

    print(f"lowest held-out loss {progress.lowest:.4f} (one that knows nothing: {math.log(len(alphabet)):.4f})")
