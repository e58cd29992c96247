"""The core's Coordinator, accepted wherever TensorFlow checks for its own."""

from __future__ import annotations

import threading
from typing import Any

import tensorflow as tf

from stepguard.coordination import coordinator

CLEAN_STOP_TYPES = (tf.errors.OutOfRangeError,)
# What a run says that a stop has cut short: the closing of a queue or of the session, not a failure of its own.
STOP_NOISE_TYPES = (tf.errors.CancelledError,)


class Coordinator(coordinator.Coordinator, tf.train.Coordinator):
    """A :class:`stepguard.coordination.coordinator.Coordinator` that is a ``tf.train.Coordinator`` by type.

    ``QueueRunner.create_threads``, ``tf.compat.v1.train.start_queue_runners`` and ``tf.compat.v1.train.LooperThread``
    take it; nothing of TensorFlow's implementation is used.

    Who holds ``_lock``, as TensorFlow's own tests do, keeps other threads from changing anything meanwhile: no stop is
    requested, no error reported, no thread registered, no join finished. It is re-entrant, for a signal handler may
    come in the middle of any of these.
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
