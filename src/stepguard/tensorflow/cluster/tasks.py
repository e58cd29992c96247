"""The tasks of a cluster that one graph needs, and the masters that a session can be opened on."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from typing import Any

import tensorflow as tf

_v1 = tf.compat.v1

LOCAL = "local"

# The errors of a run that has lost a server: the server died, was restarted, or was cut off. CancelledError and
# DeadlineExceededError are among them, because calls to a lost server may end in this way.
LOST_PEER_TYPES = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.UnavailableError,
)

# TensorFlow puts it above what a server has said.
_TITLE = "Graph execution error:"

_local_server: Any = None
_local_server_guard = threading.Lock()


class ModelWaitTimeoutError(tf.errors.DeadlineExceededError):
    """The model, or the servers that hold it, were not ready within ``max_wait_secs``. No server was lost."""

    def __init__(self, message: str) -> None:
        super().__init__(None, None, message)


class StoppedWhileWaitingError(tf.errors.CancelledError):
    """A stop was requested during the wait for the model or its servers. No server was lost."""

    def __init__(self, message: str) -> None:
        super().__init__(None, None, message)


def first_line(error: Any) -> str:
    """The first line of what the error of a run says, without TensorFlow's title above it."""
    lines = [line for line in map(str.strip, str(error.message).splitlines()) if line not in ("", _TITLE)]
    return lines[0].rstrip(".") if lines else type(error).__name__


def tasks_of(graph: Any) -> tuple[str, ...]:
    """The tasks on which ``graph`` places operations: ``/job:ps/task:0``, or ``/job:ps`` for any task of the job."""
    found = set()
    for device in {operation.device for operation in graph.get_operations()}:
        spec = tf.DeviceSpec.from_string(device or "")
        if spec.job is not None:
            found.add(f"/job:{spec.job}" + ("" if spec.task is None else f"/task:{spec.task}"))
    return tuple(sorted(found))


def narrowed(config: Any, graph: Any) -> Any:
    """``config`` with device filters for the tasks that ``graph`` needs, unless the program has set its own.

    Without filters a session waits for every server of the cluster. A restarted task would then wait until all others
    are back, even those that it does not use.
    """
    if config is not None and not isinstance(config, _v1.ConfigProto):
        # The session itself reports best what is wrong with the config.
        return config
    tasks = tasks_of(graph)
    if not tasks or (config is not None and config.device_filters):
        return config
    narrow = _v1.ConfigProto()
    if config is not None:
        narrow.CopyFrom(config)
    narrow.device_filters.extend(tasks)
    return narrow


def local_master() -> str:
    """The address of this process's own server. The first call starts the server."""
    global _local_server  # noqa: PLW0603 - one server for the process: TensorFlow cannot stop one
    with _local_server_guard:
        if _local_server is None:
            _local_server = tf.distribute.Server.create_local_server()
        return str(_local_server.target)


def isolated(config: Any) -> Any:
    """``config`` with variables that belong to one session alone, as they do in a session without a server."""
    alone = _v1.ConfigProto()
    if config is not None:
        alone.CopyFrom(config)
    alone.isolate_session_state = True
    return alone


def is_own_master(master: str) -> bool:
    """Whether ``master`` is a server of this process, which TensorFlow calls directly and not by a connection.

    TensorFlow does so only for the address that the server has as its target, ``grpc://localhost:PORT``.
    """
    port = master.removeprefix("grpc://localhost:")
    return port != master and port.isdigit() and int(port) in _own_ports()


def _own_ports() -> set[int]:
    """The ports that this process listens on; none on a system without ``/dev/fd``."""
    found = set()
    try:
        descriptors = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        return set()
    for descriptor in descriptors:
        # The descriptor may have been closed meanwhile, or be a socket that has no port.
        with contextlib.suppress(OSError, ValueError, IndexError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as one:
                    if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        found.add(int(one.getsockname()[1]))
    return found
