"""Train a digit classifier under a Supervisor, as an Equinox module and with Grain.

The module is the state, as it is: its arrays are saved, and its activation functions and sizes are compared. Grain's
loader keeps its own position.
"""

import argparse
import sys
from pathlib import Path

import equinox as eqx
import grain.python as grain
import jax
import jax.numpy as jnp
import optax

from stepguard.jax import Supervisor

sys.path.append(str(Path(__file__).parent.parent))
import digits_data

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/jax_equinox", help="checkpoints and event files (default: %(default)s)")
parser.add_argument("--steps", type=int, default=1000, help="train up to this step (default: %(default)s)")
parser.add_argument("--save-model-secs", type=int, default=1, help="seconds between checkpoints (default: %(default)s)")
args = parser.parse_args()

train, test = digits_data.load()


class Digits:
    """A source of Grain, which compares its ``repr`` when a run goes on."""

    def __repr__(self):
        return "Digits()"

    def __len__(self):
        return len(train.labels)

    def __getitem__(self, index):
        return train.images[index] / 16.0, int(train.labels[index])


loader = grain.DataLoader(
    data_source=Digits(),
    sampler=grain.IndexSampler(len(Digits()), grain.ShardOptions(0, 1), shuffle=True, num_epochs=1, seed=1),
    operations=[grain.Batch(128, drop_remainder=True)],
    read_options=grain.ReadOptions(num_threads=2),
)
model = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(1))
optimizer = optax.adam(2e-3)


@eqx.filter_jit
def train_step(state, images, labels):
    model, opt = state

    def loss_of(model):
        predicted = jax.vmap(model)(images)
        return optax.softmax_cross_entropy_with_integer_labels(predicted, labels).mean()

    loss, gradients = eqx.filter_value_and_grad(loss_of)(model)
    updates, opt = optimizer.update(gradients, opt, model)
    return (eqx.apply_updates(model, updates), opt), loss


@eqx.filter_jit
def test_accuracy(model):
    right = jax.vmap(model)(jnp.asarray(test.images / 16.0)).argmax(1) == test.labels
    return right.mean()


sv = Supervisor(args.logdir, save_model_secs=args.save_model_secs)
with sv.managed_session((model, optimizer.init(eqx.filter(model, eqx.is_array)))) as sess:
    step = sess.global_step
    print(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch", flush=True)

    for images, labels in sess.steps(loader, max_steps=args.steps):
        sess.state, loss = train_step(sess.state, images, labels)
        if (sess.global_step + 1) % 100 == 0:
            sess.summary({"loss": loss})
            print(f"step {sess.global_step + 1:5d} of {args.steps}   loss {loss:.4f}", flush=True)

    print(f"test accuracy {test_accuracy(sess.state[0]):.2%}", flush=True)
