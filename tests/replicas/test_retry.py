"""The retry loop: a new try for each lost server, ever less often, with a limit, and for nothing else."""

from __future__ import annotations

import pytest
import tensorflow as tf

from stepguard.tensorflow import ModelWaitTimeoutError, is_lost_peer, retry_on_lost_peer
from stepguard.tensorflow.cluster.tasks import StoppedWhileWaitingError


def lost(kind=tf.errors.UnavailableError):
    return kind(None, None, "gone")


class Program:
    """Raises what it is given, one error a try, and then returns."""

    def __init__(self, *errors, secs=0.0):
        self.errors = list(errors)
        self.secs = secs
        self.now = 0.0
        self.waits = []

    def train(self):
        self.now += self.secs
        if self.errors:
            raise self.errors.pop(0)
        return "trained"

    def retry(self, **options):
        return retry_on_lost_peer(self.train, wait=self.waits.append, clock=lambda: self.now, **options)


@pytest.mark.parametrize("kind", ["AbortedError", "CancelledError", "DeadlineExceededError", "UnavailableError"])
def test_a_lost_server_is_tried_again(kind):
    program = Program(lost(getattr(tf.errors, kind)))
    assert program.retry() == "trained"
    assert len(program.waits) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        lost(tf.errors.InvalidArgumentError),
        ModelWaitTimeoutError("x"),
        StoppedWhileWaitingError("x"),
    ],
)
def test_any_other_error_is_passed_on(error):
    program = Program(error)
    with pytest.raises(type(error)) as raised:
        program.retry()
    assert raised.value is error
    assert not program.waits
    assert not is_lost_peer(error)


def test_waits_grow_to_the_longest_and_differ_at_random():
    program = Program(*[lost() for _ in range(8)])
    program.retry(first_wait_secs=1, longest_wait_secs=10)
    for secs, most in zip(program.waits, [1, 2, 4, 8, 10, 10, 10, 10], strict=True):
        assert most / 2 <= secs <= most
    assert len(set(program.waits)) == 8


def test_one_loss_too_many_is_raised_and_says_which():
    errors = [lost() for _ in range(3)]
    with pytest.raises(tf.errors.UnavailableError) as raised:
        Program(*errors).retry(max_losses=2)
    assert raised.value is errors[2]
    assert "lost 3 times in a row" in raised.value.__notes__[0]


def test_a_try_that_went_well_for_a_while_starts_the_count_anew():
    program = Program(*[lost() for _ in range(20)], secs=61)
    assert program.retry(max_losses=1, first_wait_secs=1) == "trained"
    assert max(program.waits) <= 1


def test_a_wrong_bound_is_refused():
    with pytest.raises(ValueError, match="max_losses"):
        retry_on_lost_peer(lambda: None, max_losses=-1)
    with pytest.raises(ValueError, match="longest_wait_secs"):
        retry_on_lost_peer(lambda: None, longest_wait_secs=-1)
