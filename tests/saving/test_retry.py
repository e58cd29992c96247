"""When a failed save is tried again: time is what the policy is told, so an hour of failures takes no time here."""

from __future__ import annotations

import pytest

from stepguard.saving.retry import Backoff


def exactly(low: float, high: float) -> float:
    return 1.0


def test_the_wait_doubles_after_each_failed_try_up_to_the_longest():
    retry = Backoff(3600, first_secs=2.0, longest_secs=20.0, draw=exactly)

    assert [retry(tries, 0.0) for tries in range(1, 7)] == [2.0, 4.0, 8.0, 16.0, 20.0, 20.0]


def test_a_save_that_has_failed_for_as_long_as_it_may_is_given_up():
    retry = Backoff(60.0, draw=exactly)

    assert retry(7, 59.9) is not None
    assert retry(7, 60.0) is None


def test_no_failure_at_all_may_be_allowed():
    assert Backoff(0)(1, 0.0) is None


def test_a_month_of_tries_is_no_overflow():
    assert Backoff(float("inf"), draw=exactly)(50_000, 2.6e6) == 60.0


def test_the_waits_of_two_runs_are_not_the_same():
    waits = {Backoff(60.0)(1, 0.0) for _ in range(20)}

    assert len(waits) > 1
    assert all(wait == pytest.approx(1.0, abs=0.25) for wait in waits)
