"""A small training run that uses all that must be resumed: shuffling, dropout, an optimizer with a schedule.

``main`` trains in a process of its own, to be killed by a test.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import random
import time
from typing import Any

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepguard.jax import Supervisor, batches

ITEMS = 50
BATCH = 8
# Of the threads that read for Grain; by default there are 16.
FEW_THREADS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)

TX = optax.adamw(optax.cosine_decay_schedule(1e-2, 60))


def data() -> Any:
    numbers = np.random.default_rng(5)
    inputs, targets = numbers.normal(size=(ITEMS, 4)), numbers.normal(size=(ITEMS, 1))
    return {"index": np.arange(ITEMS), "inputs": inputs.astype("f"), "targets": targets.astype("f")}


class Rows:
    """A source for Grain."""

    def __init__(self) -> None:
        self._data = data()

    def __repr__(self) -> str:
        return "Rows()"  # Grain compares it.

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> Any:
        return {name: array[index] for name, array in self._data.items()}


def grain_loader(seed: int = 3) -> Any:
    sampler = grain.IndexSampler(ITEMS, grain.ShardOptions(0, 1), shuffle=True, num_epochs=1, seed=seed)
    batch = grain.Batch(BATCH, drop_remainder=True)
    return grain.DataLoader(data_source=Rows(), sampler=sampler, operations=[batch], read_options=FEW_THREADS)


def grain_dataset() -> Any:
    rows = grain.MapDataset.source(Rows()).seed(7).shuffle().repeat(None).batch(BATCH, drop_remainder=True)
    return rows.to_iter_dataset(FEW_THREADS)


def drawn() -> Any:
    """Batches that Python's and NumPy's streams choose."""
    rows = Rows()
    for _ in range(ITEMS // BATCH):
        index = [int(np.random.randint(ITEMS)), *random.sample(range(ITEMS), BATCH - 1)]
        yield {name: np.stack([rows[one][name] for one in index]) for name in rows[0]}


class OfState:
    """A loader with a state of its own, as those of torchdata and Hugging Face have."""

    def __init__(self) -> None:
        self._next = 0

    def __iter__(self) -> Any:
        rows = Rows()
        while self._next < ITEMS - BATCH:
            self._next += BATCH
            yield {name: np.stack([rows[i][name] for i in range(self._next - BATCH, self._next)]) for name in rows[0]}
        self._next = 0

    def state_dict(self) -> Any:
        return {"next": self._next}

    def load_state_dict(self, state: Any) -> None:
        self._next = state["next"]


LOADERS = {
    "batches": lambda: batches(data(), BATCH, seed=1),
    "Grain's DataLoader": grain_loader,
    "a data set of Grain": grain_dataset,
    "an iterator of Grain": lambda: iter(grain_dataset()),
    "a function": lambda: drawn,
    "a list": lambda: list(batches(data(), BATCH, seed=1)),
    "a loader with a state": OfState,
    "two": lambda: {"batch": batches(data(), BATCH, seed=1), "other": grain_loader()},
}


def initial() -> Any:
    key = jax.random.key(1)
    first, second = jax.random.normal(key, (4, 16)), jax.random.normal(key, (16, 1))
    params = {"first": first / 2, "second": second / 4}
    return {"params": params, "opt": TX.init(params), "key": jax.random.key(2), "half": jnp.ones(3, jnp.bfloat16)}


def _step(state: Any, batch: Any) -> Any:
    key, mask = jax.random.split(state["key"])

    def loss_of(params: Any) -> Any:
        hidden = jax.nn.relu(batch["inputs"] @ params["first"])
        hidden = jnp.where(jax.random.bernoulli(mask, 0.7, hidden.shape), hidden / 0.7, 0)
        return jnp.mean((hidden @ params["second"] - batch["targets"]) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state["params"])
    updates, opt = TX.update(gradients, state["opt"], state["params"])
    half = state["half"] + loss.astype(jnp.bfloat16)
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "key": key, "half": half}, loss


step = jax.jit(_step)
donating_step = functools.partial(jax.jit, donate_argnums=0)(_step)


class Training:
    """A new run, seeded."""

    def __init__(self, logdir: Any, loader: Any = None, *, donates: bool = False, **options: Any) -> None:
        random.seed(1)
        np.random.seed(1)
        self.loader = LOADERS["batches"]() if loader is None else loader
        self.sv = Supervisor(logdir, **{"save_summaries_secs": 0, "save_model_secs": 3600, **options})
        self.step = donating_step if donates else step
        self.batches: list[list[int]] = []
        self.began_at = -1
        # All that must not depend on where a run was stopped and gone on with, bit by bit.
        self.outcome: tuple[Any, ...] = ()

    def train(self, max_steps: int, on_step: Any = None) -> Training:
        with self.sv.managed_session(initial()) as session:
            self.began_at = session.global_step
            for batch in session.steps(self.loader, max_steps=max_steps):
                batch = batch.get("batch", batch)
                self.batches.append(batch["index"].tolist())
                session.state, _ = self.step(session.state, batch)
                if on_step is not None:
                    on_step(session)
        self.outcome = self._read_outcome(session.state)
        return self

    def _read_outcome(self, state: Any) -> tuple[Any, ...]:
        digest = hashlib.sha256()
        for array in jax.tree.leaves({**state, "key": jax.random.key_data(state["key"])}):
            digest.update(np.asarray(array).tobytes())
        return digest.hexdigest(), random.random(), float(np.random.rand())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--logdir", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-secs", type=float, default=0.05)
    parser.add_argument("--step-secs", type=float, default=0.004)
    parser.add_argument("--loader", default="Grain's DataLoader")
    parser.add_argument("--hold-at", type=int, help="come no further than to this step, and wait for a kill")
    args = parser.parse_args(arguments)
    training = Training(args.logdir, LOADERS[args.loader](), donates=True, save_model_secs=args.save_secs)

    def on_step(session: Any) -> None:
        if len(training.batches) == 1:
            print("in the first step", flush=True)
        print(f"step {session.global_step} {training.batches[-1]}", flush=True)
        time.sleep(args.step_secs)
        while session.global_step == args.hold_at:
            time.sleep(0.01)

    print("outcome", training.train(args.steps, on_step).outcome, flush=True)


if __name__ == "__main__":
    main()
