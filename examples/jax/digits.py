"""Train a digit classifier under a Supervisor, in one process, with JAX and Optax.

Kill it at any moment and start it again: it goes on with the very next batch, and ends bit by bit where it would have.
"""

import argparse
import functools
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepguard import Watching
from stepguard.jax import Supervisor, batches

sys.path.append(str(Path(__file__).parent.parent))
import digits_data

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/jax_digits", help="checkpoints and event files (default: %(default)s)")
parser.add_argument("--steps", type=int, default=3000, help="train up to this step (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--save-model-secs", type=int, default=1, help="seconds between checkpoints (default: %(default)s)")
parser.add_argument("--save-model-steps", type=int, help="steps between checkpoints, in addition")
args = parser.parse_args()

# The program draws nothing from these; seeded, two runs are the same to the last value that a checkpoint holds.
random.seed(1)
np.random.seed(1)
train, test = digits_data.load()
loader = batches((train.images / 16.0, train.labels.astype(int)), args.batch_size, seed=1)

# The model: 64 pixels, 128 hidden units, 10 digits.
first_key, second_key, dropout_key = jax.random.split(jax.random.key(1), 3)
params = {
    "hidden": {"kernel": jax.random.normal(first_key, (64, 128)) / 8, "bias": jnp.zeros(128)},
    "digits": {"kernel": jax.random.normal(second_key, (128, 10)) / 11, "bias": jnp.zeros(10)},
}
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, args.steps))


def predict(params, images, dropout_key=None):
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    if dropout_key is not None:
        hidden = jnp.where(jax.random.bernoulli(dropout_key, 0.8, hidden.shape), hidden / 0.8, 0)
    return hidden @ params["digits"]["kernel"] + params["digits"]["bias"]


# The step donates the state: JAX puts the new one into the same memory.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch):
    images, labels = batch
    key, dropout_key = jax.random.split(state["key"])

    def loss_of(params):
        predicted = predict(params, images, dropout_key)
        return optax.softmax_cross_entropy_with_integer_labels(predicted, labels).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state["params"])
    updates, opt = optimizer.update(gradients, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "key": key}, loss


@jax.jit
def test_accuracy(state):
    right = predict(state["params"], test.images / 16.0).argmax(1) == test.labels
    return right.mean()


sv = Supervisor(
    args.logdir,
    save_model_secs=args.save_model_secs,
    save_model_steps=args.save_model_steps,
    save_summaries_secs=1,
    summaries=lambda state: {"test_accuracy": test_accuracy(state)},
    watching=Watching(trace="batches"),
)
with sv.managed_session({"params": params, "opt": optimizer.init(params), "key": dropout_key}) as sess:
    step = sess.global_step
    print(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch", flush=True)

    for batch in sess.steps(loader, max_steps=args.steps):
        sess.state, loss = train_step(sess.state, batch)
        if (sess.global_step + 1) % 500 == 0:
            sess.summary({"loss": loss})
            print(f"step {sess.global_step + 1:5d} of {args.steps}   loss {loss:.4f}", flush=True)

    print(f"test accuracy {test_accuracy(sess.state):.2%}", flush=True)
