"""What a program draws before its first loop belongs to its run, and is drawn again by a start that goes on there."""

from __future__ import annotations

import random

from plain_session import plain_session

from stepguard.coordination.coordinator import Coordinator


def opened():
    session = plain_session(Coordinator(), None)
    session.process_state.note_beginning()
    return session


def test_a_state_from_before_the_first_loop_holds_the_streams_of_the_beginning():
    session = opened()
    began = random.getstate()
    random.random()
    saved = session.process_state.capture()
    expected = random.random()

    resumed = opened()
    resumed.process_state.restore(saved)
    assert random.getstate() == began
    random.random()
    for _ in resumed.steps(max_steps=1):
        assert random.random() == expected


def test_a_state_from_the_first_loop_holds_the_streams_of_its_step():
    session = opened()
    random.random()
    for _ in session.steps(max_steps=1):
        pass
    saved = session.process_state.capture()
    expected = random.random()

    resumed = opened()
    resumed.process_state.restore(saved)
    random.random()
    for _ in resumed.steps(max_steps=1):
        assert random.random() == expected
