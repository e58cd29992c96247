"""When a run is asked to stop, so that its last step is saved before its time is over."""

from __future__ import annotations

import time

import pytest

from stepguard.coordination.coordinator import Coordinator
from stepguard.coordination.time_limit import TimeLimit


def limit(after_secs=None, ends_at=None, measured=None, grace_secs=120.0):
    return TimeLimit(after_secs, ends_at, lambda: measured, grace_secs)


@pytest.mark.parametrize(
    ("total_secs", "measured", "grace_secs", "kept_free"),
    [
        (3600, 40.0, 120, 40.0),
        # Nothing was saved yet: the grace period, or a tenth of a shorter time.
        (3600, None, 120, 120.0),
        (600, None, 120, 60.0),
        # A run that stopped before its first step would never come to its end.
        (60, 50.0, 120, 30.0),
        (-5, 50.0, 120, 0.0),
    ],
)
def test_the_time_of_a_last_save_is_kept_free(total_secs, measured, grace_secs, kept_free):
    assert limit(measured=measured, grace_secs=grace_secs).kept_free_secs(total_secs) == pytest.approx(kept_free)


@pytest.mark.parametrize("clock", ["session", "wall"])
def test_a_run_is_asked_to_stop_that_much_before_its_end(clock):
    coord = Coordinator()
    ends = {"after_secs": 1.0} if clock == "session" else {"ends_at": time.time() + 1.0}
    began = time.monotonic()
    limit(**ends, measured=0.5).start(coord)
    assert coord.wait_for_stop(30)
    assert coord.stop_reason == "time_limit"
    assert time.monotonic() - began >= 0.4


def test_a_run_whose_time_is_over_at_its_start_is_asked_at_once():
    coord = Coordinator()
    limit(ends_at=time.time() - 5, measured=1.0).start(coord)
    assert coord.wait_for_stop(30)


def test_a_run_that_stops_by_itself_keeps_its_reason():
    coord = Coordinator()
    limit(after_secs=3600).start(coord)
    coord.request_stop()
    assert coord.stop_reason == "request_stop"
