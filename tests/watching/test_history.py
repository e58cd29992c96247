"""The accounting of a run, from ledgers as crashes, hangs, clocks and several processes leave them."""

import itertools
import json

import pytest

from stepguard.watching import history, ledger
from stepguard.watching.heartbeat import Heartbeat


class Story:
    """Writes a ledger by hand, on a clock that the test sets."""

    def __init__(self):
        self.events = []

    def tell(self, event, time, *, role="chief", pid=1, host="here", **fields):
        self.events.append({"event": event, "time": float(time), "pid": pid, "host": host, "role": role, **fields})
        return self

    def start(self, time, pid=1, **fields):
        return self.tell("start", time, pid=pid, **fields)

    def fresh(self, time, pid=1, **fields):
        return self.tell("fresh", time, pid=pid, **{"step": 0, **fields})

    def checkpoint(self, time, step, pid=1, secs=0.0):
        return self.tell("checkpoint", time, pid=pid, step=step, name=f"model.ckpt-{step}", secs=secs)

    def restore(self, time, step, pid, previous_time, previous_step, **fields):
        known = {
            "step": step,
            "checkpoint": f"model.ckpt-{step}",
            "previous_time": previous_time,
            "previous_step": previous_step,
            "lost_steps": previous_step - step,
        }
        return self.tell("restore", time, pid=pid, **{**known, **fields})

    def stop(self, time, pid=1, reason="finished", **fields):
        return self.tell("stop", time, pid=pid, reason=reason, **fields)

    def of(self, last=None, **options):
        return history.from_events(self.events, last, **options)


def times(found):
    return found.productive_secs, found.replayed_secs, found.down_secs


def crashed_once():
    """Trains from 2 to 100, the checkpoint holding what was done until 60; is killed, and trains from 110 to 150."""
    story = Story().start(0).fresh(2).checkpoint(62, 600, secs=2)
    return story.start(104, pid=2).restore(110, 600, 2, previous_time=100.0, previous_step=1000)


def test_an_empty_ledger_is_a_run_of_no_time():
    assert history.from_events([]) == history.History((), 0, 0.0, 0.0, 0.0, 0)


def test_a_run_without_a_crash_is_productive_from_its_first_step_on():
    found = Story().start(0).fresh(5).checkpoint(65, 100).stop(105, step=200).of()
    assert times(found) == (100.0, 0.0, 0.0)
    assert (found.restarts, found.lost_steps) == (0, 0)
    (attempt,) = found.attempts
    assert (attempt.first_step, attempt.last_step, attempt.reason) == (0, 200, "finished")


def test_after_a_crash_the_time_since_the_checkpoint_is_replayed_and_the_gap_is_down():
    found = crashed_once().stop(150, pid=2, step=2000).of()
    # 60 of 98 seconds were kept, and 40 were done after the restart; 10 s until it trained again.
    assert times(found) == (58.0 + 40.0, 40.0, 10.0)
    assert (found.restarts, found.lost_steps) == (1, 400)
    first, second = found.attempts
    assert (first.reason, first.last_step, first.ended) == (None, 1000, 100.0)
    assert (second.first_step, second.last_step) == (600, 2000)


def test_a_run_whose_first_lines_are_lost_trains_from_the_first_line_that_is_left():
    story = Story().checkpoint(100, 5).checkpoint(200, 9).start(204, pid=2)
    story.restore(210, 9, 2, previous_time=202.0, previous_step=9).stop(230, pid=2)
    assert times(story.of()) == (122.0, 0.0, 8.0)


def test_a_crash_before_the_first_checkpoint_replays_all_of_it():
    story = Story().start(0).fresh(1).start(50, pid=2).fresh(51, pid=2, previous_time=41.0, previous_step=70)
    found = story.stop(91, pid=2, step=200).of()
    assert times(found) == (40.0, 40.0, 10.0)
    assert found.lost_steps == 70


def test_a_model_that_lived_on_elsewhere_lost_nothing():
    story = Story().start(0).fresh(1).start(50, pid=2).fresh(51, pid=2, step=80, previous_time=41.0, previous_step=70)
    found = story.stop(91, pid=2, step=200).of()
    assert times(found) == (80.0, 0.0, 10.0)


def test_two_crashes_after_one_checkpoint_replay_both():
    story = crashed_once().start(160, pid=3).restore(165, 600, 3, previous_time=150.0, previous_step=990)
    found = story.stop(200, pid=3, step=2000).of()
    assert times(found) == (58.0 + 35.0, 40.0 + 40.0, 10.0 + 15.0)
    assert (found.restarts, found.lost_steps) == (2, 400 + 390)


def test_a_damaged_checkpoint_replays_further_back_across_attempts():
    story = Story().start(0).fresh(0).checkpoint(10, 100).start(40, pid=2)
    story.restore(40, 100, 2, previous_time=30.0, previous_step=300).checkpoint(60, 300, pid=2).start(90, pid=3)
    story.restore(90, 100, 3, previous_time=80.0, previous_step=500)
    # Of the first attempt 10 s were kept; all of the second was lost.
    assert times(story.stop(100, pid=3).of()) == (10.0 + 10.0, 20.0 + 40.0, 10.0 + 10.0)


def test_a_clean_stop_and_a_later_start_lose_nothing():
    story = Story().start(0).fresh(0).checkpoint(50, 500).stop(51, reason="sigterm", step=500)
    story.start(71, pid=2).restore(71, 500, 2, previous_time=51.0, previous_step=500)
    found = story.stop(100, pid=2, step=900).of()
    assert times(found) == (51.0 + 29.0, 0.0, 20.0)
    assert found.restarts == 0


def test_the_time_after_a_finished_run_is_not_down():
    story = Story().start(0).fresh(0).checkpoint(10, 5).stop(10, step=5)
    story.start(1000, pid=2).restore(1001, 5, 2, previous_time=10.0, previous_step=5).stop(1011, pid=2, step=9)
    assert times(story.of()) == (20.0, 0.0, 0.0)


def test_a_fresh_start_after_a_finished_run_is_a_new_run():
    story = Story().start(0).fresh(0).stop(10, step=5).start(20, pid=2).fresh(20, pid=2).stop(30, pid=2, step=5)
    assert times(story.of()) == (20.0, 0.0, 0.0)


def test_starts_that_never_trained_are_down_until_the_last_sign_of_life():
    story = Story()
    for number in range(3):
        story.start(10 * number, pid=number).stop(10 * number + 2, pid=number, reason="error", error="ValueError: no")
    found = story.of()
    assert times(found) == (0.0, 0.0, 22.0)
    assert found.restarts == 2
    assert found.attempts[-1].error == "ValueError: no"


def test_the_newest_heartbeat_prolongs_the_running_attempt_only():
    story = crashed_once()
    beat = Heartbeat("chief", pid=2, host="here", time=140.0, step=900)
    found = story.of(beat)
    assert times(found) == (58.0 + 30.0, 40.0, 10.0)
    assert found.attempts[-1].last_step == 900
    assert times(story.of(Heartbeat("chief", pid=7, host="here", time=140.0))) == (58.0, 40.0, 10.0)
    assert times(story.of(Heartbeat("chief", pid=2, host="there", time=140.0))) == (58.0, 40.0, 10.0)


def test_a_hang_that_was_ended_is_down_from_its_last_step_on():
    story = Story().start(0).fresh(0).checkpoint(50, 500).tell("hang", 200, secs=100.0, ended=True)
    story.start(210, pid=2).restore(210, 500, 2, previous_time=199.0, previous_step=800)
    assert times(story.stop(220, pid=2).of()) == (50.0 + 10.0, 50.0, 110.0)


def test_a_hang_that_went_on_is_part_of_the_run():
    story = Story().start(0).fresh(0).tell("hang", 100, secs=50.0, ended=False).stop(200, step=5)
    assert times(story.of()) == (200.0, 0.0, 0.0)


def test_a_return_of_the_nan_guard_is_replayed():
    story = Story().start(0).fresh(0).checkpoint(50, 500).tell("return", 80, step=800, to_step=500)
    found = story.stop(100, step=900).of()
    assert times(found) == (70.0, 30.0, 0.0)
    assert found.lost_steps == 300


def test_a_clock_that_goes_back_stands_still_and_nothing_is_negative():
    # An hour back between the attempts.
    story = Story().start(3600).fresh(3600).checkpoint(3650, 500)
    story.start(100, pid=2).restore(100, 500, 2, previous_time=3660.0, previous_step=600)
    found = story.stop(150, pid=2, step=900).of()
    assert times(found) == (50.0 + 50.0, 0.0, 0.0)
    # And within one.
    found = Story().start(100).fresh(100).checkpoint(200, 5).checkpoint(10, 6).stop(20, step=7).of()
    assert times(found) == (110.0, 0.0, 0.0)


def test_a_second_chief_that_was_refused_changes_nothing():
    story = Story().start(0).fresh(0).checkpoint(50, 500)
    story.start(60, pid=2).stop(60, pid=2, reason="error", error="LogdirInUseError: pid 1")
    found = story.checkpoint(90, 900).stop(100, step=1000).of()
    assert times(found) == (100.0, 0.0, 0.0)


def test_several_roles_are_accounted_apart():
    story = crashed_once().tell("start", 0, role="worker-1", pid=9).tell("fresh", 1, role="worker-1", pid=9)
    story.stop(150, pid=2, step=2000).tell("stop", 160, role="worker-1", pid=9, reason="finished")
    assert times(story.of()) == (98.0, 40.0, 10.0)
    assert times(story.of(role="worker-1")) == (159.0, 0.0, 0.0)


def test_starts_by_the_launcher_that_came_to_no_session_are_restarts():
    story = Story().tell("launch", 0, role="launcher", attempt=1).start(1, attempt=1).fresh(1)
    story.tell("exit", 10, role="launcher", attempt=1)
    for number in (2, 3):
        story.tell("launch", 10 * number, role="launcher", attempt=number)
        story.tell("exit", 10 * number + 1, role="launcher", attempt=number)
    story.tell("launch", 40, role="launcher", attempt=4).start(41, pid=4, attempt=4)
    story.restore(41, 5, 4, previous_time=9.0, previous_step=8).stop(50, pid=4)
    assert story.of().restarts == 3


def test_a_line_of_the_launcher_that_came_late_is_no_second_restart():
    story = Story().start(1, attempt=1).fresh(1).start(21, pid=2, attempt=2).fresh(21, pid=2)
    story.tell("launch", 20, role="launcher", attempt=2).tell("exit", 30, role="launcher", attempt=2)
    assert story.of().restarts == 1


def test_the_ledger_alone_tells_of_the_newest_start_of_a_role():
    story = crashed_once().checkpoint(120, 900, pid=2).tell("start", 0, role="worker-1", pid=9, process_start=77)
    chief = history.last_seen(story.events)
    assert (chief.role, chief.pid, chief.host, chief.started, chief.time) == ("chief", 2, "here", 104.0, 120.0)
    assert (chief.phase, chief.reason, chief.first_step, chief.step) == ("training", None, 600, 900)
    assert chief.last_checkpoint["name"] == "model.ckpt-900"
    story.stop(150, pid=2, reason="error", error="ValueError: no")
    chief = history.last_seen(story.events)
    assert (chief.phase, chief.reason, chief.error) == ("stopped", "error", "ValueError: no")
    worker = history.last_seen(story.events, "worker-1")
    assert (worker.phase, worker.process_start, worker.step) == ("preparing", 77, None)
    assert history.last_seen(story.events, "worker-2") is None
    assert history.last_seen([]) is None


def launched_and_failed(story, time, failure, then="restart", code=1):
    story.tell("launch", time, role="launcher", pid=99, attempt=1)
    story.tell("exit", time + 5, role="launcher", pid=99, code=code, failure=failure)
    return story.tell(then, time + 5, role="launcher", pid=99, failure=failure) if then else story


def test_the_last_error_is_that_of_the_newest_start_that_ended_by_one():
    story = Story().start(0).stop(5, reason="error", error="ValueError: old")
    assert history.last_error(story.events) == "ValueError: old"
    story.start(10, pid=2).tell("hang", 60, pid=2, secs=40.0, ended=False)
    assert history.last_error(story.events) == "ValueError: old"
    story.tell("hang", 70, pid=2, secs=50.0, ended=True)
    told = "ended by its hang watch: no step boundary for 50.0 s"
    assert history.last_error(story.events) == told
    # The launcher sees only how its watch ended it.
    story.tell("exit", 71, role="launcher", pid=99, failure="SIGKILL").tell("restart", 71, role="launcher", pid=99)
    assert history.last_error(story.events) == told
    launched_and_failed(story.start(81, pid=3), 80, "SIGKILL: line")
    assert history.last_error(story.events) == "SIGKILL: line"
    story.start(90, pid=4).stop(95, pid=4)
    assert history.last_error(story.events) == "SIGKILL: line"


def test_of_one_start_the_first_error_is_the_last_error_and_what_follows_from_it_is_not():
    story = Story().start(0).fresh(1).tell("stop", 5, role="worker-1", pid=2, reason="error", error="ValueError: bad")
    story.stop(6, reason="error", error="RuntimeError: closed by peer")
    # Of the first start the launcher's lines come once it knows where the ledger is.
    launched_and_failed(story, -1, "exit code 1: ValueError: bad")
    assert history.last_error(story.events) == "ValueError: bad"
    launched_and_failed(story, 20, "exit code 3: no session", then="gave_up")
    assert history.last_error(story.events) == "exit code 3: no session"


def test_that_a_program_was_asked_to_stop_is_no_error():
    story = launched_and_failed(Story().start(1).fresh(1).stop(4, reason="sigterm"), 0, "exit code 143", then=None)
    assert history.last_error(story.events) is None
    assert history.last_error([]) is None


@pytest.mark.parametrize("seed", range(3))
def test_any_lines_may_be_missing_torn_or_of_other_types(tmp_path, seed):
    whole = crashed_once().tell("return", 130, pid=2, step=9, to_step=600).stop(150, pid=2, step=2000).events
    lines = [ledger.encode(one) for one in whole]
    path = tmp_path / ledger.FILE_NAME
    for torn in range(len(lines)):
        kept = list(lines)
        kept[torn] = kept[torn][: len(kept[torn]) * (seed + 1) // 4] + b"\n"
        path.write_bytes(b"".join(kept))
        found = history.from_events(ledger.read(tmp_path))
        assert min(times(found)) >= 0.0
        assert sum(times(found)) <= 150.0
    for event, value in itertools.product(whole, (None, [], {}, "x", True, -1)):
        wrong = {key: value if key not in ("event", "time") else kept for key, kept in event.items()}
        found = history.from_events([wrong if one is event else one for one in whole])
        assert min(times(found)) >= 0.0
        json.dumps(found.attempts[0].last_step)
        history.last_seen([wrong if one is event else one for one in whole])
        history.last_error([wrong if one is event else one for one in whole])
