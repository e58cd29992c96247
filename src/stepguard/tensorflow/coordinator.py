"""The core's Coordinator, accepted wherever TensorFlow checks for its own."""

from __future__ import annotations

import threading
from typing import Any

import tensorflow as tf

from stepguard.coordination import coordinator

CLEAN_STOP_TYPES = (tf.errors.OutOfRangeError,)
# A run raises this when a stop has cut it short, by closing its queue or its session: it is no failure of the run.
STOP_NOISE_TYPES = (tf.errors.CancelledError,)


class Coordinator(coordinator.Coordinator, tf.train.Coordinator):
    """A :class:`stepguard.coordination.coordinator.Coordinator` that is a ``tf.train.Coordinator`` by type.

    ``QueueRunner.create_threads``, ``tf.compat.v1.train.start_queue_runners`` and ``tf.compat.v1.train.LooperThread``
    accept it. It uses nothing of TensorFlow's implementation.

    A thread that holds ``_lock``, as TensorFlow's own tests do, keeps all other threads from changing the state: no
    stop is requested, no error reported, no thread registered, no join finished. The lock is re-entrant, because a
    signal handler may run in the middle of any of these.
    """

    def __init__(self, clean_stop_exception_types: tuple[type[BaseException], ...] | None = None) -> None:
        if clean_stop_exception_types is None:
            clean_stop_exception_types = CLEAN_STOP_TYPES
        coordinator.Coordinator.__init__(self, clean_stop_exception_types, late_noise_types=STOP_NOISE_TYPES)
        self._lock = threading.RLock()

    def request_stop(self, ex: Any = None) -> None:
        """See :meth:`stepguard.Coordinator.request_stop`."""
        with self._lock:
            super().request_stop(ex)

    def clear_stop(self) -> None:
        """See :meth:`stepguard.Coordinator.clear_stop`."""
        with self._lock:
            super().clear_stop()

    def register_thread(self, thread: Any) -> None:
        """See :meth:`stepguard.Coordinator.register_thread`."""
        with self._lock:
            super().register_thread(thread)

    def _set_joined(self, stop: Any) -> None:
        with self._lock:
            super()._set_joined(stop)
