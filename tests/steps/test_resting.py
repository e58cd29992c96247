"""Between two loops the state is the program's own: what is kept for a save then, and by whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from fleet import Fleet

from stepguard.errors import NoBoundaryError
from stepguard.steps import boundary as boundary_module
from stepguard.steps import copying_budget
from stepguard.steps.boundary import Boundary
from stepguard.steps.copying_budget import CopyingBudget

SOON_SECS = 60.0


def test_copies_take_a_twentieth_of_the_time_after_the_first_ones(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("stepguard.steps.copying_budget.time.monotonic", lambda: now[0])
    budget, copies = CopyingBudget(), 0
    for _ in range(10_000):
        now[0] += 0.001
        if budget.allows_one():
            budget.spend(0.01)
            now[0] += 0.01
            copies += 1

    assert 20 <= copies <= 20 + 2 + now[0] / 20 / 0.01


def test_copies_take_a_smaller_part_of_the_time_where_that_is_asked(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("stepguard.steps.copying_budget.time.monotonic", lambda: now[0])
    budget, copies = CopyingBudget(0.005), 0
    for _ in range(100_000):
        now[0] += 0.001
        if budget.allows_one():
            budget.spend(0.01)
            now[0] += 0.01
            copies += 1

    assert 20 <= copies <= 20 + 2 + now[0] * 0.005 / 0.01


def test_rests_are_pauses_that_begin_and_end():
    boundary = Boundary()
    boundary.enter()
    boundary.leave()
    assert boundary.pauses == 0
    boundary.rest()
    assert boundary.pauses == 1
    boundary.enter()
    boundary.leave()
    boundary.enter()
    boundary.leave()
    assert boundary.pauses == 2


def test_a_copy_that_waited_for_the_processor_costs_what_the_others_do(monkeypatch):
    monkeypatch.setattr("stepguard.steps.copying_budget.time.monotonic", lambda: 0.0)
    budget = CopyingBudget()
    for secs in (0.5, 0.001, 0.5):
        assert budget.allows_one()
        budget.spend(secs)

    assert budget.allows_one()


def test_a_long_pause_buys_no_more_than_the_first_copies_had(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("stepguard.steps.copying_budget.time.monotonic", lambda: now[0])
    budget = CopyingBudget()
    now[0] = 3600.0
    copies = 0
    while budget.allows_one():
        budget.spend(0.01)
        copies += 1

    assert copies <= 22


def test_who_rests_is_asked_for_a_copy_before_a_service_has_the_boundary():
    boundary, order = Boundary(), []
    boundary.call_at_rest(lambda is_last: order.append(("copy", is_last, boundary.is_resting)))
    boundary.rest(lambda: order.append("change"), is_last=True)

    assert order == ["change", ("copy", True, False)]
    assert boundary.is_resting


def test_a_torn_state_is_not_copied():
    boundary, copies = Boundary(), []
    boundary.call_at_rest(copies.append)
    boundary.enter()
    boundary.leave_torn()
    boundary.rest()

    assert copies == []


def test_a_service_that_waits_for_a_thread_that_is_away_gives_up(monkeypatch):
    monkeypatch.setattr(boundary_module, "_PATIENCE_SECS", 0.05)
    boundary, errors = Boundary(), []
    boundary.enter()
    boundary.leave()
    boundary.go_away()

    def hold() -> None:
        try:
            with boundary.hold("a checkpoint"):
                pass
        except NoBoundaryError as error:
            errors.append(str(error))

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join(SOON_SECS)

    assert "between two steps of its own loop" in errors[0]
    # The end of the program is no step that could be waited for, and its own thread may look at any time.
    with boundary.hold("the last checkpoint", 0.05):
        pass
    with boundary.hold("a look"):
        pass
    boundary.enter()
    boundary.leave()


@pytest.mark.parametrize("ends", ["end", "more"])
def test_a_process_takes_its_part_when_its_loop_ends(ends):
    fleet = Fleet(2)
    fleet.start()
    fleet.run_steps(3)
    fleet.ends()
    assert fleet.members[1].taken == [3]
    if ends == "more":
        fleet.run_steps(2)
        fleet.ends()
        assert fleet.members[1].taken == [3, 5]

    assert fleet.save() == 1
    assert fleet.write() == [fleet.members[1].taken[-1]]
    # What is taken already is not taken from the live state again.
    assert len(fleet.members[1].taken) == (1 if ends == "end" else 2)
    fleet.close()


def test_a_part_that_was_not_copied_is_refused_and_never_read_while_the_program_has_the_state(monkeypatch):
    fleet = with_copies_that_cost(Fleet(2), monkeypatch)
    fleet.start()
    fleet.run_steps(3)
    fleet.ends()
    assert fleet.save() == 1
    refused = in_background(fleet.write)
    # The next loop begins: what the program has done between the two is part of the state now.
    fleet.step(1)

    assert "rank 1 has not copied its part at the end of its loop" in str(refused.exception(SOON_SECS))
    assert fleet.members[1].taken == []
    fleet.run_steps(1)
    fleet.close()


def test_a_part_that_was_not_copied_is_read_when_the_program_is_over(monkeypatch):
    fleet = with_copies_that_cost(Fleet(2), monkeypatch)
    fleet.start()
    fleet.run_steps(3)
    fleet.ends()
    assert fleet.save() == 1
    written = in_background(fleet.write)
    fleet.close_in_background(1)

    assert written.result(SOON_SECS) == [3]
    fleet.peers[0].close(60)


def test_a_part_that_costs_nothing_is_copied_at_the_end_of_each_loop(monkeypatch):
    # What is felt on this machine now does not matter here.
    monkeypatch.setattr(copying_budget, "_UNFELT_SECS", SOON_SECS)
    fleet = Fleet(2)
    fleet.start()
    fleet.ends()
    monkeypatch.setattr(CopyingBudget, "allows_one", lambda _: False)
    for _ in range(5):
        fleet.run_steps(1)
        fleet.ends()

    assert fleet.members[1].taken == [0, 1, 2, 3, 4, 5]
    fleet.close()


def with_copies_that_cost(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """None of them is in the budget."""
    monkeypatch.setattr(CopyingBudget, "allows_one", lambda _: False)
    monkeypatch.setattr(CopyingBudget, "costs_nothing", False)
    return fleet


def in_background(work: Callable[[], object]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - for the test
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
