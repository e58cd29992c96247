"""The rounds of several processes, with the processes as threads: what depends on who comes first."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import pytest
from fleet import Fleet, MemoryStore, StubPart, until

from stepguard.errors import CheckpointError, NoBoundaryError, NonFiniteError, PeerLeftError
from stepguard.steps import rendezvous
from stepguard.steps.gate import Loop, Moment


def test_a_chief_that_is_closed_settles_the_last_step_first(caplog):
    fleet = Fleet(2)
    fleet.request_stop()

    # The chief has asked, and its session is closed before the worker has answered.
    fleet.ends()
    fleet.peers[0].start()
    until(lambda: fleet.store.check("word/1"))
    closing = threading.Thread(target=fleet.peers[0].close, args=(60,))
    closing.start()
    fleet.peers[1].start()
    fleet.peers[1].close(60)
    closing.join(60)

    assert not closing.is_alive()
    assert warnings(caplog) == []
    assert all(gate.is_last for gate in fleet.gates)


@pytest.mark.parametrize("asked", [0, 1])
def test_the_others_are_told_why_one_was_asked_to_stop(asked):
    fleet = Fleet(3)
    fleet.start()
    fleet.ends()
    fleet.members[asked].request_stop(None, "sigterm")
    until(lambda: all(member.should_stop() for member in fleet.members))

    assert [member.reason for member in fleet.members] == ["sigterm"] * 3
    fleet.close()


@pytest.mark.parametrize("last", [0, 3])
def test_all_end_exactly_after_the_step_that_was_set_beforehand(last):
    fleet = Fleet(3)
    for gate in fleet.gates:
        gate.end_at(last)
    fleet.start()

    def train(rank):
        gate, member = fleet.gates[rank], fleet.members[rank]
        while True:
            if member.steps_done() >= last:
                member.request_stop(None, "trial")
            if not gate.begin(member.steps_done()):
                return
            member.finish_step()

    training = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in range(3)]
    for one in training:
        one.start()
    for one in training:
        one.join(60)

    assert not any(one.is_alive() for one in training)
    assert [member.steps_done() for member in fleet.members] == [last] * 3
    fleet.close()


def test_a_step_that_waits_for_a_chief_that_is_gone_goes_on():
    fleet = Fleet(2)
    gate = fleet.gates[1]
    gate.capture_at(Moment(0, 0, 0))
    gate.begin(0)  # What it has captured is still wanted at the next step.
    gate.meet_every(1, 1)
    may_begin: list[bool] = []
    step = threading.Thread(target=lambda: may_begin.append(gate.begin(1)), daemon=True)
    step.start()

    # The store is a part of the chief's process.
    fleet.peers[1].start()
    fleet.store.end()
    step.join(60)

    assert may_begin == [True]


def test_a_step_that_waits_for_the_settling_of_the_last_one_ends_its_loop_when_the_chief_is_gone():
    fleet = Fleet(2)
    gate = fleet.gates[1]
    gate.end_at(2)
    fleet.step(1)
    fleet.step(1)
    may_begin: list[bool] = []
    step = threading.Thread(target=lambda: may_begin.append(gate.begin(2)), daemon=True)
    step.start()
    fleet.peers[1].start()
    fleet.store.end()
    step.join(60)

    assert may_begin == [False]
    assert gate.loop is Loop.ENDED


def test_a_worker_that_a_second_interrupt_has_ended_is_not_waited_for(caplog):
    fleet = Fleet(2)
    fleet.ends()
    fleet.request_stop()
    fleet.members[1].impatient = True
    fleet.peers[1].start()
    fleet.peers[1].close(3600)
    fleet.peers[0].start()
    fleet.peers[0].close(3600)

    assert "rank 1 was left by a second Ctrl-C" in caplog.text


@pytest.mark.parametrize("is_stopping", [True, False])
def test_a_chief_that_evaluates_between_two_loops_is_waited_for_in_the_next_step(is_stopping, monkeypatch, caplog):
    fleet = Fleet(2)
    # The worker is in the second step, which takes both; the chief has ended a loop after the first.
    for rank in range(2):
        fleet.step(rank)
    fleet.members[0].end_loop()
    fleet.gates[1].turn(1)  # Its data was over too, and it is in the next loop.
    assert fleet.gates[1].begin(1)
    fleet.start()
    met: list[int] = []

    def meet() -> None:
        with fleet.chief.meeting("a checkpoint"):
            met.append(fleet.members[0].steps_done())

    if is_stopping:
        fleet.members[0].request_stop(None)
    else:
        threading.Thread(target=meet, daemon=True).start()
    until(lambda: fleet.store.check("word/2"))
    # For as long as the evaluation lasts, and no longer: a busy machine may take a while for the rest.
    with monkeypatch.context() as impatient:
        impatient.setattr(rendezvous, "PATIENCE_SECS", 0.1)
        time.sleep(0.5)
    assert not met
    assert not fleet.gates[0].is_last
    fleet.step(0)
    fleet.members[1].finish_step()
    if is_stopping:
        until(lambda: all(gate.is_last for gate in fleet.gates))
    else:
        fleet.step_on_until(lambda: met)

    assert warnings(caplog) == []
    assert is_stopping or met[0] >= 2
    fleet.close()


def test_nothing_is_asked_while_nothing_happens():
    fleet = Fleet(3)
    fleet.start()
    fleet.run_steps(5)
    until(lambda: fleet.store.waiting == 3)
    before = fleet.store.requests
    fleet.run_steps(50)
    time.sleep(0.2)

    assert fleet.store.requests == before
    fleet.close()


def test_a_round_stops_nobody_and_all_take_the_state_of_the_same_step():
    fleet = Fleet(3)
    fleet.start()
    training = fleet.train(step_secs=0.005)
    until(lambda: fleet.members[0].steps_done() > 30)
    # A word and its answers travel for longer than many steps.
    fleet.store.latency_secs = latency_secs = 0.2
    waited: list[float] = []
    # The first does not know yet how long a round takes, and a busy machine may spoil some.
    while len(waited) < 2 or (min(waited[1:]) >= latency_secs / 2 and len(waited) < 20):
        for member in fleet.members:
            member.waited_secs = 0.0
        with fleet.chief.meeting("a checkpoint"):
            step = fleet.members[0].steps_done()
        assert fleet.write() == [step, step]
        fleet.chief.settled()
        waited.append(max(member.waited_secs for member in fleet.members))
    training.stop()
    fleet.store.latency_secs = 0.0

    assert min(waited[1:]) < latency_secs / 2
    fleet.close()


def test_parts_are_of_one_side_of_an_epochs_end_though_no_step_lies_between():
    fleet = Fleet(2)
    chief, worker = fleet.members
    fleet.start()
    fleet.run_steps(3)
    # The chief has completed an epoch after the third step, and the worker has not yet found that its data is over.
    chief.end_loop()
    chief.complete_epoch()
    with fleet.chief.meeting("a checkpoint"):
        assert chief.moment() == (1, 0, 0)
    until(lambda: not fleet.gates[1].is_free)
    assert fleet.gates[1].begin(3)
    worker.end_loop()
    worker.complete_epoch()

    assert fleet.write() == [3]
    assert worker.taken_at == [(0, 1, 0), (1, 0, 0)]
    fleet.close()


@pytest.mark.parametrize("more_epochs", [1, 2, 3])
def test_a_part_of_the_other_side_of_an_epochs_end_is_taken_again_or_refused(more_epochs):
    fleet = Fleet(2)
    worker = fleet.members[1]
    fleet.start()
    fleet.run_steps(3)
    with fleet.chief.meeting("a checkpoint"):
        pass
    until(lambda: not fleet.gates[1].is_free)
    worker.end_loop()
    assert worker.taken_at == [(0, 1, 0)]
    for _ in range(more_epochs):
        worker.complete_epoch()

    # The part of the end before the last one is kept too, while no step lies between.
    if more_epochs <= 2:
        assert fleet.write(Moment(1, 0, 0)) == [3]
        assert worker.taken_at[:2] == [(0, 1, 0), (1, 0, 0)]
    else:
        with pytest.raises(NoBoundaryError, match="was past the beginning of epoch 1, loop 0 of this session"):
            fleet.write(Moment(1, 0, 0))
    fleet.close()


def test_a_step_that_is_known_beforehand_is_not_talked_of():
    fleet = Fleet(2)
    fleet.start()
    fleet.gates[1].meet_every(5, 5)
    fleet.run_steps(5)
    until(lambda: fleet.store.waiting == 2)
    before = fleet.store.requests
    taken: list[int] = []

    def save() -> int:
        with fleet.chief.meeting("a checkpoint"):
            taken.append(fleet.members[0].steps_done())
        return 5

    fleet.step(1)  # The worker is past it before the chief has saved.
    fleet.chief.at_known_step(save)

    assert taken == [5]
    assert fleet.store.requests == before
    assert fleet.write() == [5]
    fleet.close()


def test_the_next_known_step_waits_until_the_last_checkpoint_is_settled():
    fleet = Fleet(2)
    fleet.start()
    fleet.gates[1].meet_every(1, 1)
    fleet.run_steps(1)
    fleet.chief.at_known_step(fleet.save)
    fleet.step(1)
    begun: list[bool] = []
    threading.Thread(target=lambda: begun.append(fleet.gates[1].begin(2)), daemon=True).start()
    assert fleet.write() == [1]
    assert not begun

    fleet.chief.settled()
    until(lambda: begun == [True])
    assert fleet.members[1].taken == [1, 2]
    fleet.close()


def test_a_step_at_which_the_chief_does_not_save_is_passed():
    fleet = Fleet(2)
    fleet.start()
    fleet.gates[1].meet_every(1, 1)
    fleet.run_steps(1)
    fleet.chief.at_known_step(fleet.save)
    fleet.step(1)
    begun: list[bool] = []
    threading.Thread(target=lambda: begun.append(fleet.gates[1].begin(2)), daemon=True).start()

    fleet.step(0)
    fleet.chief.at_known_step(lambda: 1)
    until(lambda: begun == [True])
    # What it has taken at the first is kept: it is still to be written.
    assert fleet.write(Moment(0, 0, 1)) == [1]
    fleet.close()


def test_a_step_that_the_chief_passes_while_another_copies_its_part_is_passed_too():
    fleet = Fleet(2)
    fleet.start()
    gate, member = fleet.gates[1], fleet.members[1]
    gate.meet_every(1, 1)
    fleet.run_steps(1)
    is_heard = threading.Event()
    pass_meeting, take_part = gate.pass_meeting, member.take_part

    def passed(step: int) -> None:
        pass_meeting(step)
        is_heard.set()

    def taken() -> StubPart:
        part = take_part()
        if not is_heard.is_set():
            fleet.chief.at_known_step(lambda: 1)
            assert is_heard.wait(60)
            until(lambda: fleet.store.waiting == 2)
        return part

    gate.pass_meeting, member.take_part = passed, taken
    begun: list[bool] = []

    def go_on() -> None:
        fleet.step(1)
        begun.append(gate.begin(2))

    threading.Thread(target=go_on, daemon=True).start()
    until(lambda: begun == [True])
    assert member.taken == [1, 2]
    fleet.close()


def test_a_chief_whose_data_is_over_is_not_waited_for_at_a_known_step():
    """Uneven inputs under ``Join``: what the others do goes on without the chief's batches."""
    fleet = Fleet(2)
    fleet.start()
    fleet.gates[1].meet_every(5, 5)
    fleet.run_steps(5)
    fleet.chief.at_known_step(fleet.save)
    fleet.step(1)
    assert fleet.write() == [5]
    fleet.chief.settled()
    fleet.members[0].end_loop()
    until(lambda: fleet.store.waiting == 2)

    for _ in range(20):
        fleet.step(1)
    fleet.close()


def test_a_chief_whose_program_is_over_lets_the_others_find_the_end_of_their_data():
    fleet = Fleet(2)
    fleet.start()
    fleet.run_steps(3)
    fleet.members[0].end_loop()
    fleet.members[0].complete_epoch()
    fleet.request_stop()
    until(lambda: fleet.gates[1]._limit == (1, 0, 0))

    # Which it does in the next step; then comes the end of its epoch.
    assert fleet.gates[1].begin(3)
    fleet.members[1].end_loop()
    fleet.members[1].complete_epoch()
    assert not fleet.gates[1].begin(3)
    assert fleet.members[1].moment() == fleet.members[0].moment() == (1, 0, 0)
    fleet.close()


class TestUnevenInputs:
    def test_one_that_a_stop_has_cut_short_hands_in_its_last_state(self, caplog):
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        fleet.step(1)
        fleet.members[0].end_loop()
        fleet.step(1)
        fleet.members[1].request_stop(None, "sigterm")
        until(lambda: all(gate.is_last for gate in fleet.gates))
        assert not fleet.gates[1].begin(5)

        assert fleet.save() == 1
        closing = fleet.close_in_background(1)
        assert fleet.write() == [5]
        assert "this process has done 5 steps of this session and rank 0 3" in caplog.text
        fleet.joined(fleet.close_in_background(0), closing)

    def test_one_with_fewer_batches_hands_in_the_state_of_its_own_last_step(self, caplog):
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        fleet.members[1].end_loop()
        fleet.step(0)
        fleet.step(0)

        assert fleet.save() == 1
        assert fleet.write() == [3]
        # Taken before the program went on, and not when it was asked for.
        assert fleet.members[1].taken_at == [(0, 1, 0)]
        assert "this process has done 3 steps of this session and rank 0 5" in caplog.text
        fleet.close()

    def test_steps_count_from_the_beginning_of_their_loop(self):
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        fleet.step(0)
        for member in fleet.members:
            member.end_loop()
            member.complete_epoch()
        fleet.run_steps(2)

        assert fleet.save() == 1
        fleet.step(1)  # It passes the moment for which it was asked.
        assert fleet.write(Moment(1, 0, 2)) == [5]
        assert fleet.members[0].steps_done() == 6
        fleet.close()

    def test_one_between_two_loops_hands_in_nothing_for_a_step_that_it_will_come_to(self):
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        fleet.ends()
        fleet.step(0)
        fleet.step(0)
        assert fleet.save() == 1
        answers: list[list[int]] = []
        writing = threading.Thread(target=lambda: answers.append(fleet.write()), daemon=True)
        writing.start()
        for _ in range(3):
            assert answers == []
            fleet.step(1)
        writing.join(60)

        assert answers == [[5]]
        fleet.close()

    def test_one_that_has_gone_on_after_its_loop_has_no_part_for_a_step_of_that_loop(self):
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        fleet.members[1].end_loop()
        fleet.members[1].complete_epoch()
        fleet.step(0)

        assert fleet.save() == 1
        with pytest.raises(NoBoundaryError, match="rank 1 was past epoch 0, loop 0, step 4"):
            fleet.write()
        fleet.close()

    def test_a_chief_with_fewer_batches_says_what_its_checkpoint_lacks(self, caplog):
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        fleet.step(1)
        fleet.ends()

        assert fleet.save() == 1
        assert fleet.write() == [4]
        assert "rank 1 has trained 4 steps of this session and rank 0, whose model is saved, 3" in caplog.text
        fleet.close()

    def test_a_stop_is_after_the_same_step_of_the_loop(self):
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(2)
        fleet.step(1)
        for member in fleet.members:
            member.end_loop()
        fleet.run_steps(2)
        fleet.members[1].request_stop(None, "sigterm")
        until(lambda: all(gate.is_last for gate in fleet.gates))

        assert not any(gate.begin(member.steps_done()) for gate, member in zip(fleet.gates, fleet.members, strict=True))
        assert [member.moment() for member in fleet.members] == [(0, 1, 2), (0, 1, 2)]
        fleet.close()


def test_a_number_that_is_not_finite_says_nothing_against_an_earlier_part():
    fleet = Fleet(2)
    fleet.start()
    fleet.run_steps(3)
    assert fleet.save() == 1
    fleet.step(1)  # Takes its part, and has the next step behind it.
    fleet.members[1].request_stop(NonFiniteError("loss is nan", step=3, names=["loss"]))

    assert fleet.write(Moment(0, 0, 3)) == [3]
    fleet.request_stop()
    fleet.ends()
    fleet.joined(fleet.close_in_background(1), fleet.close_in_background(0))


class TestOneThatLeaves:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_by_break_ends_the_others_where_they_would_begin_a_step(self, rank):
        fleet = Fleet(3)
        fleet.start()
        fleet.run_steps(3)
        fleet.gates[rank].end(3, how=Loop.LEFT)
        leaving = fleet.close_in_background(rank)

        for other in {0, 1, 2} - {rank}:
            with pytest.raises(PeerLeftError, match=f"rank {rank} has left the training after 3 steps") as raised:
                fleet.begin_until_refused(other)
            assert raised.value.rank == rank
            fleet.members[other].request_stop(raised.value)
            fleet.close_in_background(other)
        fleet.joined(leaving)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_by_break_ends_the_others_in_a_step_that_takes_all(self, rank):
        fleet = Fleet(3)
        fleet.start()
        fleet.run_steps(3)
        others = {0, 1, 2} - {rank}
        for other in others:
            fleet.gates[other].begin(3)
        fleet.gates[rank].end(3, how=Loop.LEFT)
        leaving = fleet.close_in_background(rank)

        # It does not wait for those who wait for it, and so its process can end, and with it their step.
        fleet.joined(leaving)
        for other in others:
            until(lambda other=other: isinstance(fleet.members[other].error(), PeerLeftError))

    @pytest.mark.parametrize("is_working", [True, False])
    def test_at_the_beginning_of_a_step_ends_the_chief_in_it_unless_that_works(self, is_working, monkeypatch):
        stuck_secs = 2.0 if is_working else 0.5
        monkeypatch.setattr(rendezvous, "_STUCK_ELSEWHERE_SECS", stuck_secs)
        if is_working:
            # A very busy machine gives a thread that works less than a twentieth of a processor.
            monkeypatch.setattr(rendezvous, "_WORKING_SHARE", 0.005)
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        is_over = threading.Event()

        def train() -> None:
            fleet.gates[0].begin(3)
            deadline = time.process_time() + 1.25 * stuck_secs
            while is_working and time.process_time() < deadline:
                sum(range(10_000))
            is_over.wait(0 if is_working else 60)
            fleet.members[0].finish_step()
            fleet.gates[0].end(4, how=Loop.LEFT)

        training = threading.Thread(target=train, daemon=True)
        training.start()
        until(lambda: fleet.gates[0].begun == Moment(0, 0, 4))
        fleet.step(1)  # It leaves at the beginning of this step, which counts.
        fleet.gates[1].end(4, how=Loop.LEFT)
        leaving = fleet.close_in_background(1)
        if not is_working:
            assert fleet.members[0].wait_for_stop(60)
            is_over.set()
        fleet.joined(training)
        fleet.joined(leaving, fleet.close_in_background(0))

        assert isinstance(fleet.members[0].error(), PeerLeftError) != is_working

    def test_all_by_break_after_the_same_step_is_no_error(self):
        fleet = Fleet(3)
        fleet.start()
        fleet.run_steps(3)
        for gate in fleet.gates:
            gate.end(3, how=Loop.LEFT)
        fleet.joined(*(fleet.close_in_background(rank) for rank in (1, 2, 0)))

        assert [member.error() for member in fleet.members] == [None, None, None]

    def test_for_an_error_ends_the_others(self):
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        fleet.gates[0].begin(3)
        fleet.members[1].request_stop(ZeroDivisionError("of the program"))
        fleet.peers[1].close(60)

        until(lambda: isinstance(fleet.members[0].error(), PeerLeftError))
        assert "rank 1 was left for an error, ZeroDivisionError: of the program" in str(fleet.members[0].error())
        fleet.peers[0].close(60)

    def test_is_not_waited_for_by_the_others_who_listen_no_more(self, monkeypatch):
        # The chief has left in a step, and the other, in the next one, has ended the run for it. Now the chief's writer
        # asks for the part of an earlier step; the step of the other ends when the chief's process ends.
        monkeypatch.setattr(rendezvous, "_FAREWELL_SECS", 0.1)
        fleet = Fleet(2)
        fleet.start()
        fleet.run_steps(3)
        assert fleet.save() == 1
        fleet.gates[0].begin(3)
        fleet.step(1)
        fleet.gates[1].begin(4)
        fleet.gates[0].end(3, how=Loop.LEFT)
        fleet.chief._say_if_left()
        until(fleet.chief._is_over.is_set)
        assert isinstance(fleet.members[1].error(), PeerLeftError)

        with pytest.raises(CheckpointError, match="no answer from another process"):
            fleet.write()
        fleet.joined(fleet.close_in_background(1), fleet.close_in_background(0))

    def test_is_told_to_who_would_save_with_it(self):
        fleet = Fleet(2)
        fleet.start()
        fleet.ends()
        fleet.members[1].impatient = True
        fleet.peers[1].close(60)

        with pytest.raises(NoBoundaryError, match="rank 1 was left by a second Ctrl-C"), fleet.chief.meeting("it"):
            pass
        fleet.peers[0].close(60)


def test_a_wait_that_is_given_up_leaves_no_thread_in_the_store():
    from stepguard.steps.common_store import awaited

    store, before = MemoryStore(), set(threading.enumerate())

    def give_up() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        awaited(store, ["never/1", "never/2"], give_up)
    assert store.waiting == 0
    assert set(threading.enumerate()) <= before


def warnings(caplog: pytest.LogCaptureFixture) -> Sequence[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]
