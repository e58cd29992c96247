"""Loads the framework of a checkpoint, by the engine's name in the manifest. No other module of the CLI does."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from stepguard.cli import interrupts
from stepguard.cli.exits import FINDING, NOT_DONE, CommandError
from stepguard.cli.logdir.contents import DAMAGED, UNKNOWN_ENGINE, ListedCheckpoint
from stepguard.store.saved_tensor import SavedTensor, SavedWeight

# The module of each engine that reads its checkpoints. Those of JAX are read without JAX.
_MODULES = {
    "tensorflow": "stepguard.tensorflow.checkpoint.tensors",
    "torch": "stepguard.torch.checkpoint.tensors",
    "jax": "stepguard.orbax_files.tensors",
}
# The module of each engine that reads what an export wants of them.
_WEIGHTS = {**_MODULES, "torch": "stepguard.torch.checkpoint.weights"}
ENGINES = tuple(_MODULES)
"""The engines whose tensors can be read."""


def read_tensors(one: ListedCheckpoint) -> Iterator[SavedTensor]:
    """The tensors of a checkpoint.

    Raises:
        CommandError: its framework is unknown or missing, or its files are gone.
    """
    if one.state == DAMAGED and one.engine == UNKNOWN_ENGINE:
        raise _damaged(one)
    try:
        yield from _module(one).read_tensors(one.checkpoint.path)
    except FileNotFoundError as error:
        if one.state != DAMAGED:
            raise
        raise _damaged(one) from error


def read_weights(one: ListedCheckpoint) -> dict[str, list[SavedWeight]]:
    """The weights of each part of a checkpoint that was verified; see the module of its engine.

    Raises:
        CommandError: its framework is unknown or missing.
    """
    found: dict[str, list[SavedWeight]] = _module(one, _WEIGHTS).read_weights(one.checkpoint.path)
    return found


def tensorflow_damage(one: ListedCheckpoint) -> str | None:
    """What is wrong with a TensorFlow checkpoint without a manifest by its own checksums; None if all can be read.

    Raises CommandError where TensorFlow is not installed.
    """
    module = _module(one)
    error = module.damage(str(one.checkpoint.path))
    return None if error is None else str(module.cause(error))


def _damaged(one: ListedCheckpoint) -> CommandError:
    path = one.checkpoint.path
    return CommandError(f"{path}: damaged: {'; '.join(one.reasons)}; `stepguard verify {path}` says more", FINDING)


def _module(one: ListedCheckpoint, modules: Mapping[str, str] = _MODULES) -> Any:
    path = one.checkpoint.path
    if one.engine not in _MODULES:
        raise CommandError(
            f"{path}: expected a checkpoint of TensorFlow, PyTorch or JAX, found one of the engine {one.engine!r}",
            NOT_DONE,
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # keeps TensorFlow's lines about the processor out of the output
    try:
        with interrupts.held():
            return importlib.import_module(modules[one.engine])
    except ModuleNotFoundError as error:
        raise CommandError(
            f"{path}: its tensors cannot be read without its framework (No module named {error.name!r}): "
            f"pip install 'stepguard[{one.engine}]'",
            NOT_DONE,
        ) from error
    except ImportError as error:
        raise CommandError(f"{path}: its tensors cannot be read: {error}", NOT_DONE) from error
