"""A small run of several processes, with weights that are sharded over the devices of all.

There are four devices in all, however many processes. Collectives are gloo's. `stepguard prove` proves it, too::

    stepguard prove -- python tests/jax/jax_launch.py tests/jax/jax_distributed.py --logdir=/tmp/run --steps=60
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--logdir", type=Path, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--rank", type=int, default=0)
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--port", type=int)
parser.add_argument("--save-steps", type=int)
parser.add_argument("--save-secs", type=float, default=0)
parser.add_argument("--notes", action="store_true", help="note the batches")
parser.add_argument("--step-secs", type=float, default=0.005)
parser.add_argument("--hold-at", type=int, help="come no further than to this step, and wait for a kill")
args = parser.parse_args()

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={4 // args.processes} --xla_backend_optimization_level=0"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

if args.processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{args.port}", args.processes, args.rank)

from stepguard.jax import Supervisor, batches  # noqa: E402

mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
TX = optax.adam(1e-2)


@jax.jit
def step(state, batch):
    key, mask = jax.random.split(state["key"])

    def loss_of(params):
        hidden = jnp.tanh(batch["inputs"] @ params["first"].T)
        hidden = jnp.where(jax.random.bernoulli(mask, 0.8, hidden.shape), hidden, 0)
        return jnp.mean((hidden @ params["second"] - batch["targets"]) ** 2)

    updates, opt = TX.update(jax.grad(loss_of)(state["params"]), state["opt"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "key": key, "steps": state["steps"]}


def initial():
    numbers = np.random.default_rng(1)
    first, second = numbers.normal(size=(8, 4)).astype("f"), numbers.normal(size=(8, 1)).astype("f")
    params = {"first": jax.device_put(first, split), "second": jax.device_put(second, whole)}
    opt = jax.tree.map(lambda one: one if one.ndim else jax.device_put(one, whole), TX.init(params))
    return {"params": params, "opt": opt, "key": jax.jit(lambda: jax.random.key(1), out_shardings=whole)(), "steps": 0}


def digest(state):
    arrays = jax.tree.leaves({**state, "key": jax.random.key_data(state["key"])})
    arrays = [one if np.ndim(one) == 0 or not isinstance(one, jax.Array) else gathered(one) for one in arrays]
    return hashlib.sha256(b"".join(np.asarray(one).tobytes() for one in arrays)).hexdigest()


def gathered(array):
    return multihost_utils.process_allgather(array, tiled=True)


data = {"index": np.arange(40), "inputs": np.ones((40, 4), "f") * np.arange(40)[:, None] / 40}
data["targets"] = np.sin(data["inputs"][:, :1])
loader = batches(data, 8, seed=1, sharding=split)
sv = Supervisor(
    args.logdir,
    save_summaries_secs=0,
    save_model_secs=args.save_secs,
    save_model_steps=args.save_steps,
)
seen = args.logdir.with_suffix(f".seen-{args.rank}")
with sv.managed_session(initial()) as sess:
    print("began at", sess.global_step, flush=True)
    trains = False
    for batch in sess.steps(loader, max_steps=args.steps):
        sess.state = {**step(sess.state, batch), "steps": sess.state["steps"] + 1}
        jax.block_until_ready(sess.state)
        if args.notes:
            with seen.open("a") as lines:
                mine = [one for shard in batch["index"].addressable_shards for one in np.asarray(shard.data).tolist()]
                lines.write(f"{sess.global_step} {mine}\n")
        if not trains:
            print("trains", flush=True)
        trains = True
        time.sleep(args.step_secs)
        while sess.global_step == args.hold_at:
            time.sleep(0.01)
if sess.global_step == args.steps:
    print("outcome", sess.global_step, digest(sess.state), sess.state["steps"], flush=True)
