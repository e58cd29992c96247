"""The constructor's arguments, checked at the door: a wrong one is named before anything is built or written."""

from __future__ import annotations

import json
import os
from typing import Any

import tensorflow as tf

from stepguard.options import check_seconds
from stepguard.tensorflow.checkpoint.tensors import PATTERN
from stepguard.tensorflow.defaults import is_default, summary_tensor

_v1 = tf.compat.v1

_FETCHES = ("ready_op", "ready_for_local_init_op", "init_op", "local_init_op", "summary_op", "global_step")
_CALLS = {
    "saver": ("save", "restore"),
    "summary_writer": ("add_summary", "add_session_log", "close", "reopen"),
}


def check(*, is_chief: bool, **given: Any) -> None:
    """Check the types and values of the Supervisor's arguments that are no options of Stepguard's.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what was found.
    """
    graph = given["graph"]
    if not isinstance(graph, tf.Graph):
        raise _wrong_type("graph", "a tf.Graph", graph)
    for name in _FETCHES:
        _check_fetch(name, given[name], graph)
    for name in ("ready_op", "ready_for_local_init_op", "summary_op"):
        if tf.nest.is_nested(given[name]):
            raise _wrong_type(name, "one tensor", given[name])
    _check_summary(given["summary_op"], graph)
    _check_global_step(given["global_step"])
    check_seconds("recovery_wait_secs", given["recovery_wait_secs"])
    calls = {**_CALLS, "session_manager": ("prepare_session",) if is_chief else ("wait_for_session",)}
    for name, methods in calls.items():
        value = given[name]
        if value is None or (is_default(value) and name != "session_manager"):
            continue
        if name == "summary_writer" and not is_chief:
            continue  # Only the chief has one.
        lacking = [method for method in methods if not callable(getattr(value, method, None))]
        if lacking:
            raise _wrong_type(name, f"an object with the methods {', '.join(methods)}", value)
    if given["logdir"] is not None and not isinstance(given["logdir"], (str, os.PathLike)):
        raise _wrong_type("logdir", "a path", given["logdir"])
    if given["logdir"]:
        _check_basename(given["checkpoint_basename"])
    if given["init_fn"] is not None and not callable(given["init_fn"]):
        raise _wrong_type("init_fn", "a function of one argument, the session", given["init_fn"])
    if given["init_feed_dict"] is not None and not isinstance(given["init_feed_dict"], dict):
        raise _wrong_type("init_feed_dict", "a dictionary", given["init_feed_dict"])
    options = given["local_init_run_options"]
    if options is not None and not isinstance(options, _v1.RunOptions):
        raise _wrong_type("local_init_run_options", "a tf.compat.v1.RunOptions", options)
    _check_logdir(given["logdir"])


def worker_role() -> str:
    """What a worker is called where the run is watched: by its index in ``TF_CONFIG``, else by its process."""
    try:
        task = json.loads(os.environ.get("TF_CONFIG", ""))["task"]
        kind, index = str(task["type"]), int(task["index"])
    except (ValueError, KeyError, TypeError):
        return f"worker-{os.getpid()}"
    return f"{kind if kind.isalnum() else 'worker'}-{index}"


def check_devices(graph: Any) -> None:
    """A replica's variables must say where they live.

    Raises:
        ValueError: one does not.
    """
    for operation in graph.get_operations():
        if operation.type in ("Variable", "VariableV2") and not operation.device:
            raise ValueError(
                f"with is_chief=False every variable needs a device, and {operation.name!r} has none: build the "
                "model inside `with tf.device(tf.compat.v1.train.replica_device_setter(...)):`"
            )


def _check_fetch(name: str, value: Any, graph: Any) -> None:
    if value is None or is_default(value):
        return
    try:
        flat = tf.nest.flatten(value, expand_composites=True)
        for item in flat:
            graph.as_graph_element(item)
    except (TypeError, ValueError, KeyError) as error:
        raise type(error)(
            f"{name}: expected an operation or tensor of the graph, found {value!r:.80}: {error}"
        ) from error


def _check_summary(value: Any, graph: Any) -> None:
    if value is None or is_default(value):
        return
    element = graph.as_graph_element(value)
    if isinstance(element, tf.Operation) and summary_tensor(element, graph) is element:
        raise TypeError(
            f"summary_op: expected an operation with one output, the serialised Summary, found {element.name!r} with "
            f"{[output.dtype.name for output in element.outputs]}"
        )


def _check_global_step(value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    if value is None or is_default(value) or dtype is None:
        return
    if not dtype.base_dtype.is_integer:
        raise TypeError(f"global_step: expected an integer tensor, found one of type {dtype.base_dtype.name}")
    shape = tf.TensorShape(getattr(value, "shape", None))
    if shape.is_fully_defined() and shape.num_elements() != 1:
        raise ValueError(f"global_step: expected a tensor of size 1, found one of shape {shape}")


def _check_basename(value: str) -> None:
    basename = os.path.basename(value)
    if not basename:
        raise ValueError(
            f"checkpoint_basename: expected the name of a file, found {value!r}; 'model.ckpt' is the usual one"
        )
    if basename.startswith("."):
        raise ValueError(
            f"checkpoint_basename: expected a name that does not begin with a dot, found {value!r}; such names are "
            "those of files that are not complete"
        )
    if PATTERN.intersection(basename):
        raise ValueError(
            f"checkpoint_basename: expected a name without {' '.join(sorted(PATTERN))}, found {value!r}; TensorFlow "
            "takes the path of a checkpoint for a pattern when it restores it"
        )


def _check_logdir(logdir: Any) -> None:
    """A logdir that cannot be used is said so now, and not after an hour of training."""
    if not logdir or "://" in os.fspath(logdir):
        return
    if os.path.exists(logdir) and not os.path.isdir(logdir):
        raise NotADirectoryError(f"logdir: expected a directory, found the file {os.fspath(logdir)}; name another one")


def _wrong_type(name: str, expected: str, found: Any) -> TypeError:
    return TypeError(f"{name}: expected {expected}, found {type(found).__name__}: {found!r:.80}")
