"""The two Coordinators and LooperThreads that are compared, and what is done with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import stepguard.coordination.coordinator
import stepguard.coordination.looper
import stepguard.tensorflow

SOON_SECS = 60.0

TheirCoordinator = tf.train.Coordinator

TheirLooper = tf.compat.v1.train.LooperThread


class OurCoordinator(stepguard.coordination.coordinator.Coordinator, tf.train.Coordinator):
    """As the TensorFlow engine has it: TensorFlow's by type, and nothing of its implementation."""

    def __init__(self, clean_stop_exception_types: tuple[type[BaseException], ...] | None = None) -> None:
        if clean_stop_exception_types is None:
            clean_stop_exception_types = (tf.errors.OutOfRangeError,)
        super().__init__(clean_stop_exception_types, late_noise_types=(tf.errors.CancelledError,))


class BoomError(Exception):
    """What goes wrong in these tests."""


def end_of_input() -> Exception:
    return tf.errors.OutOfRangeError(None, None, "end of input")


def report(coord: Any, error: BaseException) -> None:
    """As TensorFlow wants it: while the error is being handled."""
    try:
        raise error
    except BaseException as handled:  # noqa: BLE001 - every kind, as stop_on_exception
        coord.request_stop(handled)


def outcome(call: Callable[..., object], *args: Any, **kwargs: Any) -> object:
    """What the call returned, or the type and the text of what it raised."""
    try:
        return call(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001
        return type(error), str(error)


def in_block(coord: Any, error: BaseException) -> None:
    with coord.stop_on_exception():
        raise error


def started(work: Callable[..., object], *args: object, name: str | None = None) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    thread.start()
    return thread


class AwaitedThread(threading.Thread):
    """Works once a join has found it alive: on a busy machine it would else have ended before the join looks."""

    def __init__(self, work: Callable[[], object] = lambda: None) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._is_awaited = threading.Event()
        self.found_alive_at = 0.0

    def is_alive(self) -> bool:
        alive = super().is_alive()
        if alive and not self._is_awaited.is_set():
            self.found_alive_at = time.monotonic()
            self._is_awaited.set()
        return alive

    def run(self) -> None:
        assert self._is_awaited.wait(SOON_SECS)
        self._work()
