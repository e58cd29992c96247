"""Ctrl-C in a loop of one of several processes: it is raised after the step that is the last of all of them."""

from __future__ import annotations

import signal

import pytest
from plain_session import plain_session

from stepguard.coordination.coordinator import Coordinator
from stepguard.steps.gate import Gate, Moment
from stepguard.steps.session import Session


def open_session(gate: Gate | None) -> Session:
    session = plain_session(Coordinator(), gate)
    session.hold_interrupts()
    return session


@pytest.mark.parametrize("place", ["last step of an epoch", "end of an epoch", "end of a loop"])
def test_the_steps_that_another_process_needs_are_done_first(place):
    gate = Gate()
    session = open_session(gate)
    steps: list[int] = []
    third = Moment(0, 1, 1) if place == "end of a loop" else Moment(1, 0, 1)

    def interrupt(here: str, is_here: bool) -> None:
        if here == place and is_here:
            signal.raise_signal(signal.SIGINT)
            # Another process has begun its third step.
            gate.open_until(third)
        elif len(steps) == 3:
            # All processes have come to that step.
            gate.open_until(third, is_last=True)

    def train_epochs() -> None:
        for epoch in session.epochs(3):
            for number in session.steps([0, 1]):
                steps.append(session.global_step)
                interrupt("last step of an epoch", (epoch, number) == (0, 1))
            interrupt("end of an epoch", epoch == 0)

    def train_loops() -> None:
        for loop in range(1, 4):
            for _ in session.steps([0, 1], epochs=loop):
                steps.append(session.global_step)
                interrupt("a step", False)
            interrupt("end of a loop", loop == 1)

    with pytest.raises(KeyboardInterrupt):
        train_loops() if place == "end of a loop" else train_epochs()
    assert steps == [0, 1, 2]
    assert session._coord.stop_requested
    session.close()


def test_a_lone_process_leaves_between_two_loops_at_once():
    session, done = open_session(None), []
    with pytest.raises(KeyboardInterrupt):
        for epoch in session.epochs(3):
            done.append(epoch)
            for _ in session.steps([0, 1]):
                pass
            signal.raise_signal(signal.SIGINT)
    assert done == [0]
    session.close()


def test_what_is_held_when_no_step_follows_is_raised_when_the_session_is_closed():
    session = open_session(Gate())
    for _ in session.epochs(1):
        for _ in session.steps([0, 1]):
            pass
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        session.close()


def test_a_session_that_was_left_open_keeps_no_interrupt_from_the_next():
    before = signal.getsignal(signal.SIGINT)
    left = open_session(None)
    session, done = open_session(None), []
    with pytest.raises(KeyboardInterrupt):
        for step in session.steps(max_steps=3):
            signal.raise_signal(signal.SIGINT)
            done.append(step)
    assert done == [0]
    session.close()
    # The one that was left open is in charge again, until it ends.
    assert signal.getsignal(signal.SIGINT) not in (before, signal.SIG_DFL)
    left.close()
    assert signal.getsignal(signal.SIGINT) == before


def test_sessions_that_end_in_the_order_in_which_they_began_leave_the_handler_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    first, second = open_session(None), open_session(None)
    first.close()
    second.close()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_session_may_be_told_twice_and_taken_over_from_in_any_order():
    before = signal.getsignal(signal.SIGINT)
    first, second = open_session(None), open_session(None)
    for one in (first, second, first):
        one.hold_interrupts()
    first.close()
    first._interrupts.start()
    second.close()
    first._interrupts.finish()
    assert signal.getsignal(signal.SIGINT) == before
