"""What the tests of the commands share: a way to call them, logdirs without a framework, and one of each engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stepguard.cli.main import cli
from stepguard.options import Saving

# For what is crafted.
sys.path.append(str(Path(__file__).parent.parent / "process"))
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("launches", "logdirs")


@pytest.fixture
def stepguard() -> Callable[..., Result]:
    """Call the command in this process; an exception that is no end of a command is an error of the test."""
    return lambda *arguments: CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=False)


@pytest.fixture
def document(stepguard: Callable[..., Result]) -> Callable[..., Any]:
    """What a command prints with --json."""
    return lambda *arguments: json.loads(stepguard(*arguments, "--json").stdout)


@pytest.fixture(scope="session")
def tensorflow_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logdir of TensorFlow with the steps 2 and 4; the variables are of all kinds."""
    tf = pytest.importorskip("tensorflow")
    from stepguard.tensorflow import Supervisor

    logdir = tmp_path_factory.mktemp("tensorflow")
    v1 = tf.compat.v1
    for last in (2, 4):
        with tf.Graph().as_default():
            step = v1.train.get_or_create_global_step()
            v1.get_variable("half", initializer=tf.constant([[1.5, -2.5]], tf.bfloat16))
            v1.get_variable("flags", initializer=tf.constant([True, False]), trainable=False)
            v1.get_variable("words", initializer=tf.constant(["a", "b"]), trainable=False)
            v1.get_variable("wave", initializer=tf.constant([3 + 4j], tf.complex64), trainable=False)
            v1.get_variable("nothing", initializer=tf.zeros([0, 3]))
            v1.get_variable("broken", initializer=tf.constant([1.0, float("nan"), float("-inf")]))
            train = v1.assign_add(step, 1)
            sv = Supervisor(
                logdir=str(logdir),
                save_model_secs=0,
                saving=Saving(save_at_end=True),
                save_summaries_secs=0,
                summary_op=None,
            )
            with sv.managed_session() as sess:
                while sess.run(step) < last:
                    sess.run(train)
    return logdir


@pytest.fixture(scope="session")
def torch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logdir of PyTorch with the steps 2 and 4."""
    pytest.importorskip("torch")
    from tensorboard.summary.writer import event_file_writer

    logdir = tmp_path_factory.mktemp("torch")
    with pytest.MonkeyPatch.context() as patch:
        # Event files of one second are told apart by a counter of the process, and the tenth sorts before the ninth.
        patch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
        _train(logdir)
    return logdir


@pytest.fixture(scope="session")
def jax_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logdir of JAX with the steps 2 and 4."""
    pytest.importorskip("jax")
    import jax
    import jax.numpy as jnp

    from stepguard.jax import Supervisor

    logdir = tmp_path_factory.mktemp("jax")
    kinds = {
        "half": jnp.asarray([1.5, -2.5], jnp.bfloat16),
        "flags": jnp.asarray([True, False]),
        "nothing": jnp.zeros((0, 3)),
        "broken": jnp.asarray([1.0, float("nan"), float("-inf")]),
        "wave": jnp.asarray([3 + 4j]),
        "eighth": jnp.asarray([0.5, -1.0], jnp.float8_e4m3fn),
        "word": "same",
        "patience": 3,
    }
    for last in (2, 4):
        sv = Supervisor(logdir, save_model_secs=0, saving=Saving(save_at_end=True), save_summaries_secs=0)
        with sv.managed_session({"params": [jnp.zeros(3)], "kinds": kinds, "key": jax.random.key(0)}) as session:
            for _ in session.steps(max_steps=last):
                session.state = {**session.state, "params": [session.state["params"][0] + 1]}
    return logdir


def _train(logdir: Path) -> None:
    import torch

    from stepguard.torch import Supervisor, Values

    for last in (2, 4):
        model = torch.nn.Linear(3, 2)
        kinds = Values(
            half=torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
            flags=torch.tensor([True, False]),
            nothing=torch.zeros(0, 3),
            broken=torch.tensor([1.0, float("nan"), float("-inf")]),
            wave=torch.tensor([3 + 4j]),
            word="same",
            patience=3,
        )
        state = {"model": model, "kinds": kinds}
        sv = Supervisor(state, logdir=logdir, save_model_secs=0, saving=Saving(save_at_end=True), save_summaries_secs=0)
        with sv.managed_session() as sess:
            for step in sess.steps(max_steps=last):
                with torch.no_grad():
                    model.bias.fill_(step)
                sess.summary({"loss": 1 / (step + 1)})


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[Any]]]:
    """Processes that are gone at the end of the test, with all that they have started."""
    started: list[subprocess.Popen[Any]] = []
    yield started
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
        one.communicate()
