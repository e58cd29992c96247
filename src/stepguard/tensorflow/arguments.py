"""Checks the constructor's arguments, so that a wrong one is reported before anything is built or written."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import tensorflow as tf

from stepguard.options import Options, Saving, Stopping, Watching
from stepguard.tensorflow.checkpoint.tensors import PATTERN
from stepguard.tensorflow.defaults import is_default, summary_tensor
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

_HAVE_DEFAULTS = (
    "ready_op",
    "ready_for_local_init_op",
    "init_op",
    "local_init_op",
    "saver",
    "summary_op",
    "global_step",
    "summary_writer",
)
# The arguments for which TensorFlow's class takes any false value as "none".
_MAY_BE_FALSE = ("saver", "summary_writer", "init_fn", "init_feed_dict", "local_init_run_options", "logdir")
# Used in place of a time that is no number.
_IN_PLACE_SECS = {"recovery_wait_secs": 30.0, "stop_grace_secs": Stopping().stop_grace_secs}
# Used in place of a negative time, with which TensorFlow's timers would tick without a pause.
_SHORTEST_SECS = 1.0
_USUAL_BASENAME = Saving().checkpoint_basename
_DEFAULTS = {
    "save_summaries_secs": Watching().save_summaries_secs,
    "save_model_secs": Saving().save_model_secs,
    "checkpoint_basename": _USUAL_BASENAME,
}


def forgiving(*, is_chief: bool, logdir: Any, **given: Any) -> dict[str, Any]:
    """Correct mistakes with which TensorFlow's class still runs, in those arguments that are options of Stepguard's.

    An argument that cannot be corrected is left for the options to refuse. If nothing uses it in this process, the
    default takes its place, with a warning.
    """
    for name, value in given.items():
        check = _basename if name == "checkpoint_basename" else _seconds
        try:
            given[name] = check(name, value)
        except (TypeError, ValueError) as error:
            if name != "stop_grace_secs" and not (is_chief and logdir):
                _log.warning("%s. It is not used here", error)
                given[name] = _DEFAULTS[name]
            elif name == "checkpoint_basename":
                raise
    return given


def checked(options: Options, *, is_chief: bool, **given: Any) -> dict[str, Any]:
    """Check the Supervisor's other arguments, and return them as it uses them.

    An argument with which TensorFlow's class runs to the end is no error here. A wrong argument that nothing uses in
    this process (the saver of a worker, a summary operation that is never run) gives a warning and is left alone; a
    likely mistake gives a warning and is corrected.

    Raises:
        TypeError, ValueError: the message names the argument, the expected and the found value.
    """
    graph = given["graph"]
    if not isinstance(graph, tf.Graph):
        raise _wrong_type("graph", "a tf.Graph", graph)
    unused = _unused(options, is_chief, given)
    for name, check in _checks(options, is_chief, given).items():
        value = given[name]
        if (value is None and name != "recovery_wait_secs") or (is_default(value) and name in _HAVE_DEFAULTS):
            continue
        try:
            given[name] = check(name, value)
        except (TypeError, ValueError, KeyError, OSError) as error:
            if name in _MAY_BE_FALSE and not value:
                given[name] = None
            elif name in unused:
                _log.warning("%s. It is not used here", error.args[0])
                # These two are used even so, for watching the run.
                given[name] = None if name in ("global_step", "logdir") else value
            else:
                raise
    return given


def _checks(options: Options, is_chief: bool, given: Mapping[str, Any]) -> dict[str, Callable[[str, Any], Any]]:
    """The check of each argument: a function of the argument's name and value that returns the value to use."""
    graph, summarises = given["graph"], options.watching.save_summaries_secs
    return {
        "ready_op": partial(_tensor, graph),
        "ready_for_local_init_op": partial(_tensor, graph),
        "init_op": partial(_fetch, graph),
        "local_init_op": partial(_fetch, graph),
        "summary_op": partial(_summary, graph),
        "global_step": partial(_global_step, graph),
        "recovery_wait_secs": _seconds,
        "saver": _having("restore", *(["save"] if options.saving.is_on else [])),
        "summary_writer": _having("add_session_log", "close", "reopen", *(["add_summary"] if summarises else [])),
        "session_manager": _having("prepare_session" if is_chief else "wait_for_session"),
        "logdir": _directory,
        "init_fn": _function,
        "init_feed_dict": _feeds,
        "local_init_run_options": _run_options,
    }


def _unused(options: Options, is_chief: bool, given: Mapping[str, Any]) -> set[str]:
    """The names of the arguments that nothing uses in a process with these arguments."""
    unused: set[str] = set()
    if not (is_chief and given["logdir"]):
        unused |= {"saver", "summary_op", "global_step"}
    if not is_chief:
        unused |= {"init_op", "init_feed_dict", "init_fn", "summary_writer", "logdir"}
    writer = given["summary_writer"]
    if not (is_default(writer) or writer):
        unused |= {"summary_op", "global_step"}
    if not options.watching.save_summaries_secs:
        unused |= {"summary_op"}
    if not options.saving.is_on:
        unused |= {"saver"}
    if given["session_manager"] is not None:
        unused |= {"ready_op", "ready_for_local_init_op", "local_init_op", "local_init_run_options"}
    return unused


def worker_role() -> str:
    """The name of a worker for those who watch the run: by its index in ``TF_CONFIG``, else by its process id."""
    try:
        task = json.loads(os.environ.get("TF_CONFIG", ""))["task"]
        kind, index = str(task["type"]), int(task["index"])
    except (ValueError, KeyError, TypeError):
        return f"worker-{os.getpid()}"
    return f"{kind if kind.isalnum() else 'worker'}-{index}"


def check_devices(graph: Any) -> None:
    """Check that each variable of a replica has a device.

    Raises:
        ValueError: a variable has none.
    """
    for operation in graph.get_operations():
        if operation.type in ("Variable", "VariableV2") and not operation.device:
            raise ValueError(
                f"with is_chief=False every variable needs a device, and {operation.name!r} has none: build the "
                "model inside `with tf.device(tf.compat.v1.train.replica_device_setter(...)):`"
            )


def _fetch(graph: Any, name: str, value: Any) -> Any:
    try:
        for item in tf.nest.flatten(value, expand_composites=True):
            graph.as_graph_element(item)
    except (TypeError, ValueError, KeyError) as error:
        raise type(error)(
            f"{name}: expected an operation or tensor of the graph, found {value!r:.80}: {error}"
        ) from error
    return value


def _tensor(graph: Any, name: str, value: Any) -> Any:
    if tf.nest.is_nested(value):
        raise _wrong_type(name, "one tensor", value)
    return _fetch(graph, name, value)


def _summary(graph: Any, name: str, value: Any) -> Any:
    element = graph.as_graph_element(_tensor(graph, name, value))
    if isinstance(element, tf.Operation) and summary_tensor(element, graph) is element:
        raise TypeError(
            f"summary_op: expected an operation with one output, the serialised Summary, found {element.name!r} with "
            f"{[output.dtype.name for output in element.outputs]}"
        )
    return value


def _global_step(graph: Any, name: str, value: Any) -> Any:
    _fetch(graph, name, value)
    if isinstance(value, str):
        value = graph.as_graph_element(value)
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return value
    kind = dtype.base_dtype
    if not (kind.is_integer or kind.is_floating or kind.is_complex or kind.is_bool or kind == tf.resource):
        raise TypeError(f"global_step: expected an integer tensor, found one of type {kind.name}")
    if not kind.is_integer:
        exact = ", and counts exactly up to 16,777,216 only" if kind == tf.float32 else ""
        _log.warning(
            "global_step: expected an integer tensor, found one of type %s%s. Its value is used as an integer; "
            "tf.compat.v1.train.get_or_create_global_step() makes one of int64",
            kind.name,
            exact,
        )
    shape = tf.TensorShape(getattr(value, "shape", None))
    if shape.is_fully_defined() and shape.num_elements() != 1:
        raise ValueError(f"global_step: expected a tensor of size 1, found one of shape {shape}")
    return value


def _seconds(name: str, value: Any) -> float | None:
    """Return a time in seconds; correct the wrong values with which TensorFlow's class still runs."""
    may_be_never = name not in _IN_PLACE_SECS
    if value is None and may_be_never:
        return None
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise _wrong_type(name, "a number of seconds", value) from None
    if math.isnan(number) or number < 0:
        least = _IN_PLACE_SECS.get(name, _SHORTEST_SECS)
        if name == "stop_grace_secs" and number < 0:
            least = 0.0
        never = "; 0 or None means never" if may_be_never else ""
        _log.warning("%s: expected a number of seconds >= 0, found %s. %g is used%s", name, value, least, never)
        return least
    if (value is True and name != "stop_grace_secs") or not isinstance(value, numbers.Real):
        _log.warning("%s: expected a number of seconds, found %r. %g is used", name, value, number)
    return value if type(value) is int else number


def _having(*methods: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if any(not callable(getattr(value, method, None)) for method in methods):
            raise _wrong_type(name, f"an object with the methods {', '.join(methods)}", value)
        return value

    return check


def _function(name: str, value: Any) -> Any:
    if not callable(value):
        raise _wrong_type(name, "a function of one argument, the session", value)
    return value


def _feeds(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong_type(name, "a dictionary", value)
    return value


def _run_options(name: str, value: Any) -> Any:
    if not callable(getattr(value, "SerializeToString", None)):
        raise _wrong_type(name, "a tf.compat.v1.RunOptions", value)
    if not isinstance(value, _v1.RunOptions):
        _log.warning("%s: expected a tf.compat.v1.RunOptions, found a %s", name, type(value).__name__)
    return value


def _basename(name: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise _wrong_type(name, "a string", value)
    path = os.fspath(value)
    basename = os.path.basename(path)
    if not basename:
        _log.warning("%s: expected the name of a file, found %r. %r is used", name, path, path + _USUAL_BASENAME)
        return path + _USUAL_BASENAME
    if basename.startswith("."):
        raise ValueError(
            f"checkpoint_basename: expected a name that does not begin with a dot, found {path!r}; such names are "
            "those of files that are not complete"
        )
    if PATTERN.intersection(basename):
        raise ValueError(
            f"checkpoint_basename: expected a name without {' '.join(sorted(PATTERN))}, found {path!r}; TensorFlow "
            "takes the path of a checkpoint for a pattern when it restores it"
        )
    return path


def _directory(name: str, value: Any) -> Any:
    """Refuse an unusable logdir now, and not after an hour of training."""
    if not isinstance(value, (str, os.PathLike)):
        raise _wrong_type(name, "a path", value)
    if value and "://" not in os.fspath(value) and os.path.exists(value) and not os.path.isdir(value):
        raise NotADirectoryError(f"logdir: expected a directory, found the file {os.fspath(value)}; name another one")
    return value


def _wrong_type(name: str, expected: str, found: Any) -> TypeError:
    return TypeError(f"{name}: expected {expected}, found {type(found).__name__}: {found!r:.80}")
