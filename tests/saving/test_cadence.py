"""When a checkpoint is due by its cost: a run of steps on a clock of its own, which checkpoints slow down."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from stepguard import Saving
from stepguard.engine import StepsDone
from stepguard.saving.cadence import LOOK_SECS, Cadence


@dataclass
class Run:
    """A run that trains with a cadence. ``now`` is its clock; nothing here waits.

    A checkpoint stops the steps for ``stall_secs``, and is then written for ``write_secs`` and uploaded for
    ``upload_secs``, in which steps take ``slower`` times as long.
    """

    options: Saving
    step_secs: float = 0.05
    stall_secs: float = 0.02
    write_secs: float = 0.4
    upload_secs: float = 0.0
    slower: float = 1.2
    nbytes: int = 1000
    is_shared: bool = False
    tells_steps: bool = True
    # Changes the length of the step of that number.
    length: Callable[[int, float], float] = lambda number, secs: secs
    now: float = 1000.0
    number: int = 0
    ended_at: float = 0.0
    pauses: int = 0
    saved_at: list[float] = field(default_factory=list)
    fails: bool = False
    tries: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cadence = Cadence(self.options, clock=lambda: self.now)
        self.writing_until = self.sending_until = self.now
        self.next_look = self.now
        self.is_due = self.was_written = False
        self.cadence.begin(self.told, is_shared=self.is_shared)

    @property
    def told(self) -> StepsDone | None:
        return StepsDone(self.number, self.ended_at, self.pauses) if self.tells_steps else None

    def pass_time(self, until: float) -> None:
        """Let the clock run, and the cadence look."""
        while self.next_look <= until:
            self.now = self.next_look
            self.next_look += LOOK_SECS
            is_writing = self.now < self.writing_until
            if not is_writing and not self.was_written:
                self.was_written = True
                self.cadence.wrote(self.nbytes)
            is_uploading = not is_writing and self.now < self.sending_until
            self.is_due |= self.cadence.look(self.told, is_writing=is_writing, is_uploading=is_uploading)
        self.now = until

    def step(self) -> None:
        secs = self.length(self.number, self.step_secs)
        slow_secs = max(0.0, max(self.writing_until, self.sending_until) - self.now)
        self.pass_time(self.now + min(secs * self.slower, slow_secs) + max(0.0, secs - slow_secs / self.slower))
        self.number += 1
        self.ended_at = self.now
        if self.is_due:
            self.is_due = False
            self.save()

    def save(self) -> None:
        self.tries.append(self.now)
        if self.fails:
            self.cadence.failed()
            return
        taken_at = self.now
        self.pass_time(self.now + self.stall_secs)
        self.is_due = False
        self.cadence.took(self.told, self.stall_secs)
        self.saved_at.append(taken_at)
        self.writing_until = self.now + self.write_secs
        self.sending_until = self.writing_until + self.upload_secs
        self.was_written = False

    def train(self, secs: float) -> None:
        end = self.now + secs
        while self.now < end:
            self.step()

    def rest(self, secs: float) -> None:
        """Something of the program's that is no training, between two loops."""
        self.pauses += 1
        self.pass_time(self.now + secs)
        self.pauses += 1

    @property
    def intervals(self) -> list[float]:
        return [after - before for before, after in zip(self.saved_at, self.saved_at[1:], strict=False)]


def saving(overhead: float = 0.01, **bounds: float | None) -> Saving:
    return Saving(overhead=overhead, **{"min_interval_secs": 1, "max_interval_secs": None, **bounds})  # type: ignore[arg-type]


def true_cost(run: Run) -> float:
    """The seconds that a checkpoint of ``run`` costs: the stall, and by how much its write makes steps longer."""
    return run.stall_secs + (run.write_secs + run.upload_secs) * (1 - 1 / run.slower)


def later(run: Run) -> list[float]:
    """The intervals after the first few, in which the cost became known."""
    assert len(run.intervals) > 6, run.intervals
    return run.intervals[3:]


@pytest.mark.parametrize("overhead", [0.002, 0.01, 0.05])
def test_the_interval_is_the_cost_over_the_part_of_the_time_that_it_may_take(overhead):
    run = Run(saving(overhead))

    run.train(20 * true_cost(run) / overhead)

    assert all(interval == pytest.approx(true_cost(run) / overhead, rel=0.15, abs=0.35) for interval in later(run))
    report = run.cadence.report
    assert report is not None
    assert report.overhead == overhead
    assert report.cost == pytest.approx(overhead, rel=0.15)
    assert report.interval_secs == pytest.approx(run.intervals[-1], rel=0.15)


def test_a_stall_alone_counts_as_much_as_slower_steps():
    run = Run(saving(), stall_secs=0.1, slower=1.0)

    run.train(300)

    assert all(interval == pytest.approx(10, rel=0.05) for interval in later(run))


def test_slower_steps_alone_count_as_much_as_a_stall():
    run = Run(saving(), stall_secs=0.0, write_secs=1.0, slower=1.25)

    run.train(600)

    assert all(interval == pytest.approx(20, rel=0.1) for interval in later(run))


def test_checkpoints_that_become_dearer_become_rarer():
    run = Run(saving())
    run.train(150)
    before = later(run)[-1]

    run.stall_secs, run.write_secs = 3 * run.stall_secs, 3 * run.write_secs
    run.train(600)

    assert run.intervals[-1] == pytest.approx(3 * before, rel=0.15)


def test_steps_of_all_lengths_do_not_confuse_it():
    draw = random.Random(7)
    # Every fiftieth batch comes late, too.
    run = Run(
        saving(),
        length=lambda number, secs: secs * draw.lognormvariate(0, 0.2) * (12 if number % 50 == 0 else 1),
    )

    run.train(1500)

    intervals = sorted(later(run))
    exact = true_cost(run) / 0.01
    assert exact / 2 < intervals[len(intervals) // 2] < exact * 2
    report = run.cadence.report
    assert report is not None
    assert report.cost < 0.0125


def test_long_steps_are_measured_one_by_one():
    draw = random.Random(3)
    run = Run(saving(), step_secs=3.0, length=lambda _, secs: secs * draw.uniform(0.99, 1.01))

    run.train(2000)

    intervals = sorted(later(run))
    # Not more often than a step can be compared with a quiet one.
    assert min(intervals) > 2 * run.step_secs
    assert 0.4 * true_cost(run) / 0.01 < intervals[len(intervals) // 2] < 2 * true_cost(run) / 0.01


def test_a_chance_event_in_one_checkpoint_does_not_put_off_the_next_ones():
    run = Run(saving())
    run.train(120)
    before = later(run)[-1]

    run.save()
    run.pass_time(run.now + 50)  # Say, the machine was suspended: the step under way takes as long.
    run.train(30)

    assert run.saved_at[-1] - run.saved_at[-2] < 2 * before


# --- the first ones ---


def test_the_first_comes_as_soon_as_there_are_quiet_steps_to_compare_with():
    run = Run(saving(), step_secs=0.3)

    run.train(60)

    assert run.saved_at[0] - 1000 < 3
    assert run.intervals[0] < 30


def test_none_comes_before_a_step_is_done():
    run = Run(saving(max_interval_secs=5))

    run.pass_time(run.now + 100)

    assert not run.is_due


def test_none_comes_after_the_program_has_stopped_stepping():
    run = Run(saving(max_interval_secs=5))
    run.train(60)
    run.save()

    run.pass_time(run.now + 100)

    assert not run.is_due


def test_a_model_that_others_train_is_saved_although_this_process_does_no_step():
    run = Run(saving(max_interval_secs=5), is_shared=True)

    run.pass_time(run.now + 100)

    assert run.is_due


def test_where_no_steps_are_told_the_stall_alone_counts():
    run = Run(saving(), tells_steps=False, stall_secs=0.1)

    run.train(200)

    assert all(interval == pytest.approx(10, rel=0.1) for interval in later(run))


@pytest.mark.parametrize("stall_secs", [0.02, 12.0])
def test_where_each_step_has_an_evaluation_the_stall_alone_counts_and_none_comes_early(stall_secs):
    run = Run(saving(), step_secs=0.5, stall_secs=stall_secs)

    while run.now < 12_000:
        run.step()
        run.pauses += 2

    # Without quiet steps, each time after the ten minutes after which a baseline is too old.
    assert all(interval == pytest.approx(max(600, stall_secs / 0.01), rel=0.02) for interval in run.intervals)
    assert len(run.intervals) > 5


def test_a_shared_model_is_saved_on_after_the_last_step_of_this_process():
    run = Run(saving(), is_shared=True)
    run.train(60)
    for _ in range(3):
        run.save()
        run.pass_time(run.now + 1000)
        assert run.is_due


def test_steps_of_many_minutes_are_not_taken_for_none():
    run = Run(saving(0.02), step_secs=700, write_secs=300, slower=2)

    run.train(60_000)

    # A checkpoint costs 150 seconds, far more than its stall.
    assert all(interval == pytest.approx(7500, abs=1000) for interval in run.intervals[1:])
    assert len(run.intervals) > 4


def test_an_earlier_session_of_the_same_run_leaves_what_checkpoints_cost():
    run = Run(saving(), stall_secs=0.2)
    run.train(200)
    run.number, run.ended_at = 0, 0.0
    run.cadence.begin(run.told, is_shared=False)
    run.saved_at.clear()
    run.save()  # Before the first step.

    run.train(200)

    assert run.intervals
    assert all(interval == pytest.approx(true_cost(run) / 0.01, rel=0.15) for interval in run.intervals)


# --- bounds ---


def test_it_is_at_least_the_shortest_interval_apart():
    run = Run(saving(min_interval_secs=7), stall_secs=0, slower=1.0)

    run.train(100)

    assert all(interval == pytest.approx(7, abs=0.3) for interval in later(run))


def test_after_the_longest_interval_one_is_due_whatever_it_costs_and_writes():
    run = Run(saving(max_interval_secs=20, max_bytes_per_day=1000), stall_secs=5, nbytes=10**9)

    run.train(200)

    # From the end of one snapshot to the beginning of the next.
    assert all(interval == pytest.approx(25, abs=0.5) for interval in later(run))
    report = run.cadence.report
    assert report is not None
    assert report.cost > 0.2
    assert run.cadence.exceeded_bytes_per_day == pytest.approx(10**9 / 20 * 86_400)


def test_it_writes_no_more_than_the_bound_in_a_day():
    run = Run(saving(max_bytes_per_day=86_400e6), nbytes=30_000_000)

    run.train(600)

    assert all(interval == pytest.approx(30, abs=0.3) for interval in later(run))
    report = run.cadence.report
    assert report is not None
    assert report.bytes_per_day == pytest.approx(86_400e6, rel=0.02)
    assert run.cadence.exceeded_bytes_per_day is None


# --- slow disks, mirrors, pauses ---


def test_none_is_due_while_one_is_written_and_there_is_quiet_time_between_two():
    run = Run(saving(max_interval_secs=10), stall_secs=0.0, slower=1.001, write_secs=30.0)
    dues = []
    run.train(5)
    for _ in range(4000):
        run.step()
        dues.append((run.now, run.is_due))

    assert len(run.saved_at) > 4
    assert all(interval > 30 for interval in run.intervals)


def test_a_slow_disk_alone_leaves_a_tenth_of_quiet_time():
    run = Run(saving(), stall_secs=0.0, slower=1.001, write_secs=30.0)

    run.train(400)

    assert all(32.5 < interval < 36 for interval in later(run))


def test_the_upload_to_a_mirror_counts_too():
    run = Run(saving(), upload_secs=2.0)

    run.train(2000)

    assert all(interval == pytest.approx(true_cost(run) / 0.01, rel=0.15) for interval in later(run))


def test_an_upload_that_slows_nothing_holds_nothing_up():
    run = Run(saving(), stall_secs=0.02, write_secs=0.2, upload_secs=1e6, slower=1.0)

    run.train(100)

    assert all(interval == pytest.approx(2, abs=0.5) for interval in later(run))


def test_an_upload_that_goes_on_and_costs_too_much_holds_the_next_one_up():
    run = Run(saving(max_interval_secs=100), upload_secs=60.0, slower=1.1)

    run.train(1000)

    assert all(interval > 60 for interval in later(run))


def test_time_between_loops_is_no_cost():
    run = Run(saving())
    for _ in range(60):
        run.train(4)
        run.rest(30)

    # Of the cost, what fell into a rest was not seen: the interval is that of a rest and a little.
    report = run.cadence.report
    assert report is not None
    assert report.cost < 0.02
    assert report.interval_secs < 45


def test_copies_at_the_ends_of_loops_are_paid_for_before_the_next_checkpoint():
    run = Run(saving(), stall_secs=0.05, slower=1.0)
    run.train(60)
    run.save()
    run.cadence.copied(0.15)

    run.train(60)

    assert run.intervals[-1] == pytest.approx(5, rel=0.1)
    assert max(run.intervals) == pytest.approx(20, rel=0.1)


def test_a_session_that_went_back_does_not_confuse_the_steps():
    run = Run(saving())
    run.train(150)
    before = later(run)[-1]

    run.save()
    run.pass_time(run.now + 60)
    run.cadence.went_back()
    run.ended_at = run.now
    run.train(100)

    assert run.intervals[-1] == pytest.approx(before, rel=0.15)


def test_a_save_that_is_due_and_cannot_be_made_is_tried_again_after_growing_pauses():
    run = Run(saving(max_interval_secs=60), stall_secs=0.01, slower=1.0)
    run.train(60)
    run.tries.clear()
    run.fails = True

    run.train(200)

    pauses = [after - before for before, after in zip(run.tries, run.tries[1:], strict=False)]
    assert pauses[:4] == pytest.approx([5, 10, 20, 40], abs=0.5)
    run.fails = False
    run.train(100)
    assert run.intervals[-1] == pytest.approx(1, abs=0.3)
