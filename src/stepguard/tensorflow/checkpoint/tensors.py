"""Reads the tensors of a TensorFlow checkpoint without the program that saved it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import tempfile
import time
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from stepguard.errors import CheckpointCorruptError
from stepguard.store import tensorflow_files
from stepguard.store.saved_tensor import SavedTensor, SavedWeight
from stepguard.words import logger

_log = logger(__name__)

PATTERN = frozenset("*?[\\")
"""TensorFlow takes a path that has one of these characters for a pattern."""

# The part that is all variables of the model.
_WHOLE = "model"
# What the optimizers of TensorFlow and a Supervisor's program keep beside the variables of the model.
_NO_WEIGHTS = ("global_step", "beta1_power", "beta2_power")

# Longer than the tick of any file system's clock but FAT's, whose times have whole seconds.
_SETTLED_NSECS = 2_100_000_000


@contextlib.contextmanager
def without_pattern(path: str) -> Iterator[str]:
    """A path to the checkpoint that TensorFlow does not take for a pattern, valid inside the block.

    If the directory's path looks like a pattern, this is a path through a temporary symbolic link, which only a reader
    on this machine can use.
    """
    place, name = os.path.split(path)
    if "://" in path or not PATTERN.intersection(place):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stepguard-") as directory:
        link = os.path.join(directory, "logdir")
        os.symlink(os.path.abspath(place), link)
        yield os.path.join(link, name)


def check_readable(path: str) -> None:
    """Raise CheckpointCorruptError if a file of the checkpoint with the prefix ``path`` is no file that ends.

    TensorFlow opens whatever has the name: it would wait at a FIFO for ever, or read a device to an end that never
    comes. Paths that only TensorFlow can reach are not checked.
    """
    if "://" in path:
        return
    place, name = os.path.split(path)
    for one in sorted(_no_files(place or os.curdir)):
        if one == name or one.startswith((f"{name}.", f"{name}-")):
            found = os.path.join(place, one)
            raise CheckpointCorruptError(f"{found}: expected a regular file, found none", path=Path(found))


def _no_files(place: str) -> Collection[str]:
    """The names in a directory that are neither files nor directories, nor lead to one."""
    try:
        changed = os.stat(place).st_mtime_ns
    except OSError:
        return ()  # Whoever opens a file there gets the error.
    # The clock of a file system is coarse: what is added right after the last change has the same time.
    is_settled = abs(time.time_ns() - changed) > _SETTLED_NSECS
    return _listed_no_files(place, changed) if is_settled else _listed_no_files.__wrapped__(place, changed)


@functools.lru_cache(maxsize=4)
def _listed_no_files(place: str, changed: int) -> Collection[str]:  # noqa: ARG001 - a part of the key
    # Once for a directory, and not for each of its thousands of checkpoints.
    try:
        with os.scandir(place) as entries:
            return frozenset(one.name for one in entries if not one.is_file() and not one.is_dir())
    except OSError:
        return ()


def restorable(path: str) -> str:
    """The path by which TensorFlow restores the checkpoint with the prefix ``path``.

    It is a pattern if the checkpoint is sharded and in the old format (V1).
    """
    if not tf.io.gfile.exists(tensorflow_files.entry_file(path)) and not tf.io.gfile.exists(path):
        for shard in old_shards(path):
            return tensorflow_files.pattern(path, shard.rpartition("-")[2])
    return path


def exists(path: str) -> bool:
    """Whether files with the names of a checkpoint with the prefix ``path`` exist."""
    return tf.io.gfile.exists(tensorflow_files.entry_file(path)) or tf.io.gfile.exists(path) or bool(old_shards(path))


def is_old_format(path: str) -> bool:
    """Whether files of a checkpoint in the old format exist at the prefix ``path``; some of them may be missing."""
    if os.path.exists(tensorflow_files.entry_file(path)):
        return False
    return os.path.isfile(path) or bool(old_shards(path))


def old_shards(path: str) -> list[str]:
    """The sorted names of the files of a sharded checkpoint in the old format."""
    place, name = os.path.split(path)
    try:
        names = tf.io.gfile.listdir(place or os.curdir)
    except tf.errors.OpError:
        return []  # There is no such directory.
    return sorted(one for one in names if tensorflow_files.is_old_shard(one, name))


def read_tensors(path: Path) -> Iterator[SavedTensor]:
    """The tensors of the checkpoint with the prefix ``path``, sorted by name; each is read on demand.

    Raises CheckpointCorruptError if the index cannot be read.
    """
    try:
        source = _Source(restorable(str(path)))
        shapes, types = source.reader.get_variable_to_shape_map(), source.reader.get_variable_to_dtype_map()
    except CheckpointCorruptError:
        raise
    except Exception as error:  # The reader may raise any error for a file that is no index.
        raise CheckpointCorruptError(f"{path}: {cause(error)}", path=path) from error
    for name in sorted(shapes):
        dtype, shape = types[name], tuple(shapes[name])
        # No array can hold a variant, such as the state of an iterator.
        read = None if dtype == tf.variant else functools.partial(_read, path, source, name)
        nbytes = None if dtype in (tf.string, tf.variant) else math.prod(shape) * dtype.size
        yield SavedTensor(name, dtype.name, shape, nbytes, read)


def read_weights(path: Path) -> dict[str, list[SavedWeight]]:
    """The variables by their scopes; those of the whole model, without what belongs to optimizers, are ``model``.

    A variable of an optimizer is below another one (``dense/kernel/Adam``) or has a name that TensorFlow gives it. A
    scope with the name ``model`` is no part of its own. Raises as :func:`read_tensors`.
    """
    variables = {one.name: one for one in read_tensors(path) if one.nbytes is not None and one.read is not None}
    found: dict[str, list[SavedWeight]] = {}
    source = _Source(restorable(str(path)))
    for name, one in variables.items():
        above = name.split("/")[:-1]
        is_slot = any("/".join(above[:end]) in variables for end in range(1, len(above) + 1))
        weight = SavedWeight(
            name, one.dtype, one.shape, one.nbytes or 0, functools.partial(_bytes, path, source, name), name
        )
        if not (is_slot or name in _NO_WEIGHTS):
            found.setdefault(_WHOLE, []).append(weight)
        if above and above[0] != _WHOLE:
            found.setdefault(above[0], []).append(weight)
    return found


class _Source:
    """A reader of a checkpoint, with the symbolic link through which it may open the data at each read."""

    def __init__(self, path: str) -> None:
        check_readable(tensorflow_files.without_pattern(path))
        link = contextlib.ExitStack()
        weakref.finalize(self, link.close)
        self.reader = tf.compat.v1.train.NewCheckpointReader(link.enter_context(without_pattern(path)))


def step_held(path: str | Path, name: str) -> int | None:
    """The global step that a checkpoint holds under ``name``; None if none can be read there."""
    try:
        return int(np.asarray(_Source(restorable(str(path))).reader.get_tensor(name)).reshape(-1)[0])
    except Exception as error:  # noqa: BLE001 - the reader may raise any error for a file that is no index
        _log.debug("%s: the step that it holds cannot be read: %s", path, error)
        return None


def written_at(path: str) -> float:
    """The time of the last write of a checkpoint's entry file, or else of its data (Unix time); 0 if unknown."""
    shards = [os.path.join(os.path.dirname(path), one) for one in old_shards(path)]
    for file in (tensorflow_files.entry_file(path), path, *shards):
        with contextlib.suppress(tf.errors.OpError):
            return float(tf.io.gfile.stat(file).mtime_nsec) / 1e9
    return 0.0


def damage(path: str) -> Exception | None:
    """The damage in the bytes of a checkpoint without a manifest, found by TensorFlow's own checksums.

    None if each tensor can be read: then the failure had another cause than the checkpoint.
    """
    try:
        for tensor in read_tensors(Path(path)):
            if tensor.read is not None:  # This reader cannot read, and so cannot check, other tensors.
                tensor.read()
    except CheckpointCorruptError as error:
        return error.__cause__ if isinstance(error.__cause__, Exception) else error
    return None


def cause(error: BaseException) -> str:
    """The line of TensorFlow's message that says what is wrong: the line after the name of the node."""
    lines = str(error).strip().splitlines() or [""]
    behind_node = [after for before, after in itertools.pairwise(lines) if before.startswith("Node: ")]
    return f"{type(error).__name__}: {(behind_node or lines)[0]}"


def _bytes(path: Path, source: _Source, name: str) -> Any:
    try:
        array = np.ascontiguousarray(source.reader.get_tensor(name))
    except Exception as error:  # as below
        raise CheckpointCorruptError(f"{path}: tensor {name}: {cause(error)}", path=path) from error
    return array.reshape(-1).view(np.uint8)


def _read(path: Path, source: _Source, name: str) -> Any:
    try:
        array = np.asarray(source.reader.get_tensor(name))
    except Exception as error:  # as above
        raise CheckpointCorruptError(f"{path}: tensor {name}: {cause(error)}", path=path) from error
    if array.dtype.fields:  # A quantised type is returned as its integers.
        return array.view(array.dtype[0])
    return array if array.dtype.kind in "biufcOSU" else array.astype(np.float32)
