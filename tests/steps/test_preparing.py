"""Before its first loop a program prepares its run: no state from which a run could go on is there yet."""

from __future__ import annotations

import random

from plain_session import plain_session

from stepguard.coordination.coordinator import Coordinator


def opened():
    session = plain_session(Coordinator(), None)
    session.process_state.note_beginning()
    return session


def test_a_save_that_falls_due_before_the_first_loop_is_made_before_the_first_step():
    session = opened()
    made = []

    def save():
        made.append(session.global_step)

    assert session.defer(save)
    assert session.defer(save)
    assert made == []
    for _ in session.steps(max_steps=2):
        assert made == [0]
        assert not session.defer(save)


def test_a_loop_of_the_programs_own_is_prepared_too():
    session = opened()
    made = []
    assert session.defer(lambda: made.append(session.global_step))
    with session.step():
        assert made == [0]
        assert not session.defer(list)


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
