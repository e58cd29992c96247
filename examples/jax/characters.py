"""Train a small character language model with Flax nnx on eight devices, and let it write.

Each device trains with an eighth of every batch. Without accelerators, the eight devices are threads of the CPU. Kill
the program at any moment and start it again: it goes on with the very next batch, and writes the same text in the end.
"""

import argparse
import math
import os
from pathlib import Path

if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stepguard.jax import Supervisor, batches

TEXT_PATH = Path(__file__).parent.parent / "data" / "us-constitution.txt"
CONTEXT = 64

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/jax_characters", help="checkpoints, events (default: %(default)s)")
parser.add_argument("--steps", type=int, default=600, help="train up to this step (default: %(default)s)")
parser.add_argument(
    "--save-model-secs", type=float, default=1, help="seconds between checkpoints (default: %(default)s)"
)
parser.add_argument("--characters", type=int, default=400, help="how many to write (default: %(default)s)")
args = parser.parse_args()

text = TEXT_PATH.read_text(encoding="ascii")
alphabet = sorted(set(text))
numbers = {character: number for number, character in enumerate(alphabet)}
encoded = np.array([numbers[character] for character in text])
train, held_out = encoded[:-4000], encoded[-4000:]
# Passages of CONTEXT characters and one more from anywhere in the text: views of it, not copies.
passages = np.lib.stride_tricks.sliding_window_view(train, CONTEXT + 1)


class Characters(nnx.Module):
    """Predicts each next character from the ones before, by causal convolutions."""

    def __init__(self, rngs, width=128):
        self.embed = nnx.Embed(len(alphabet), width, rngs=rngs)
        self.layers = nnx.List(
            [nnx.Conv(width, 2 * width, (3,), kernel_dilation=d, padding="CAUSAL", rngs=rngs) for d in (1, 2, 4, 8)]
        )
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.predict = nnx.Linear(width, len(alphabet), rngs=rngs)

    def __call__(self, characters):
        seen = self.embed(characters)
        for layer in self.layers:
            seen = seen + self.drop(nnx.glu(layer(seen)))
        return self.predict(seen)


model = Characters(nnx.Rngs(1))
optimizer = nnx.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(4e-3, args.steps)), wrt=nnx.Param)

# The batch is split over the devices, and each of them has the whole model.
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
loader = batches(passages, 32, seed=1, sharding=NamedSharding(mesh, PartitionSpec("data")))
everywhere = NamedSharding(mesh, PartitionSpec())
for part in (model, optimizer):
    nnx.update(part, jax.device_put(nnx.state(part), everywhere))


def loss_of(model, passages):
    predicted = model(passages[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(predicted, passages[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, passages):
    loss, gradients = nnx.value_and_grad(loss_of)(model, passages)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def predict_last(model, characters):
    return model(characters)[0, -1]


def held_out_loss(model):
    return float(nnx.jit(loss_of)(nnx.view(model, deterministic=True), held_out[None]))


def write(model, beginning, count):
    """The model's own continuation."""
    chance = np.random.default_rng(7)
    model, written = nnx.view(model, deterministic=True), beginning.rjust(CONTEXT)
    for _ in range(count):
        read = jnp.array([[numbers[character] for character in written[-CONTEXT:]]])
        odds = np.exp(np.asarray(predict_last(model, read), float) / 0.7)
        written += alphabet[chance.choice(len(alphabet), p=odds / odds.sum())]
    return written.lstrip()


sv = Supervisor(args.logdir, save_model_secs=args.save_model_secs)
with sv.managed_session({"model": model, "optimizer": optimizer}) as sess:
    step = sess.global_step
    print(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch", flush=True)

    for batch in sess.steps(loader, max_steps=args.steps):
        # The step changes the objects in place, and they are the state.
        loss = train_step(model, optimizer, batch)
        if (sess.global_step + 1) % 100 == 0:
            sess.summary({"loss": loss})
            print(f"step {sess.global_step + 1:5d} of {args.steps}   loss {loss:.4f}", flush=True)

    print(f"held-out loss {held_out_loss(model):.3f} (one that knows nothing: {math.log(len(alphabet)):.3f})\n")
    print(write(model, "The Congress shall have power", args.characters), flush=True)
