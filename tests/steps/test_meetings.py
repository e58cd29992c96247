"""Meetings: steps after which each process takes its part of a checkpoint unasked."""

from __future__ import annotations

import pytest
from plain_session import plain_session

from stepguard.coordination.coordinator import Coordinator
from stepguard.steps.gate import Gate, Loop, Moment


class Attendant:
    """Notes at which moments the state is taken, and where it may be at the end of a loop."""

    def __init__(self, gate, session):
        self.gate, self.session = gate, session
        self.taken = []
        self.due_at_ends = []

    def take_state(self):
        self.taken.append(self.session.moment)
        self.gate.free()

    def loop_changed(self, *, is_due):
        if self.gate.loop is not Loop.RUNS and is_due:
            self.due_at_ends.append(self.session.moment)
            self.gate.free()


@pytest.fixture
def met():
    gate = Gate()
    session = plain_session(Coordinator(), gate)
    attendant = Attendant(gate, session)
    gate.attend(attendant)
    gate.meet_every(3, 3)
    return session, attendant


@pytest.mark.parametrize("has_data", [True, False])
def test_the_part_of_a_loops_last_step_is_taken_before_the_loop_ends(met, has_data):
    """The chief, which saves there, is in its loop too."""
    session, attendant = met
    for _ in session.steps(range(100), epochs=1, max_steps=9) if has_data else session.steps(max_steps=9):
        pass
    assert attendant.taken == [Moment(0, 0, 3), Moment(0, 0, 6), Moment(0, 0, 9)]
    assert attendant.due_at_ends == []
    # The next loop, too.
    for _ in session.steps(max_steps=15):
        pass
    assert attendant.taken[3:] == [Moment(0, 1, 3), Moment(0, 1, 6)]


def test_the_part_of_an_epochs_last_step_is_taken_before_the_loop_ends(met):
    session, attendant = met
    for _ in session.epochs(2):
        for _ in session.steps(range(3), max_steps=6):
            pass
    assert attendant.taken + attendant.due_at_ends == [Moment(0, 0, 3), Moment(1, 0, 3)]
