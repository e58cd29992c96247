"""Retries training after a server of the cluster was lost: a new session for each try, growing waits, and a limit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from stepguard.errors import add_note
from stepguard.options.checks import check_count, check_seconds
from stepguard.tensorflow.cluster.tasks import LOST_PEER_TYPES, ModelWaitTimeoutError, StoppedWhileWaitingError
from stepguard.words import logger

_log = logger(__name__)

_ResultT = TypeVar("_ResultT")


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` says that a server was lost, so that a new session may go on.

    These are AbortedError, CancelledError, DeadlineExceededError and UnavailableError of ``tf.errors``. Two errors of
    these types are not: the DeadlineExceededError of a worker that has waited ``max_wait_secs`` for its chief in vain,
    and the CancelledError of a worker that was asked to stop during that wait.
    """
    waited = (ModelWaitTimeoutError, StoppedWhileWaitingError)
    return isinstance(error, LOST_PEER_TYPES) and not isinstance(error, waited)


def retry_on_lost_peer(
    train: Callable[[], _ResultT],
    *,
    max_losses: int | None = 10,
    first_wait_secs: float = 0.5,
    longest_wait_secs: float = 30.0,
    good_after_secs: float = 60.0,
    is_lost: Callable[[BaseException], bool] = is_lost_peer,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> _ResultT:
    """Call ``train()``, and call it again each time that it loses a server; return what it returns.

    ``train`` builds its graph and its Supervisor, and trains in ``managed_session``, so that each try has a session of
    its own. The wait between two tries doubles after each loss, and is shortened by a random part, so that the tasks
    of a cluster do not all return at the same moment. A signal interrupts the wait as usual.

    Args:
        train: one try. When it returns, no other try follows.
        max_losses: how many losses in a row are survived; the next one is raised. ``None`` never gives up.
        first_wait_secs: the longest wait after the first loss, in seconds.
        longest_wait_secs: the longest wait of all, in seconds.
        good_after_secs: after a try that has lasted this long, in seconds, counting and waits begin anew.
        is_lost: whether an error means a lost server. Any other error is raised at once.
        wait: ``wait(secs)``, for tests and for programs with a stop flag of their own.
        clock: monotonic seconds, for tests.

    Raises:
        Exception: the error of ``train``, if it is no lost server, or if it is one loss too many; then a note on the
            error says how many there were.
        ValueError: an argument is out of its range.
    """
    _check(max_losses, first_wait_secs, longest_wait_secs, good_after_secs)
    losses = 0
    while True:
        began = clock()
        try:
            return train()
        except Exception as error:
            if not is_lost(error):
                raise
            if clock() - began >= good_after_secs:
                losses = 0
            losses += 1
            if max_losses is not None and losses > max_losses:
                add_note(error, f"a server was lost {losses} times in a row; max_losses={max_losses}")
                raise
            wait_secs = min(first_wait_secs * 2 ** min(losses - 1, 32), longest_wait_secs) * random.uniform(0.5, 1.0)
            _log.warning("lost a server (%s); next try in %.1f s", _one_line(error), wait_secs)
        wait(wait_secs)


def _check(max_losses: Any, first_wait_secs: float, longest_wait_secs: float, good_after_secs: float) -> None:
    check_count("max_losses", max_losses, or_none=True)
    check_seconds("first_wait_secs", first_wait_secs)
    check_seconds("longest_wait_secs", longest_wait_secs)
    check_seconds("good_after_secs", good_after_secs)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
