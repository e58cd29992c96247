"""The rounds of several processes, with the processes as threads: what depends on who comes first."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch.distributed as dist

from stepguard.steps.gate import Gate
from stepguard.steps.rendezvous import Rendezvous
from stepguard.torch.distributed.world import TorchStore


def test_a_chief_that_is_closed_settles_the_last_step_first(caplog):
    store = TorchStore(dist.HashStore())
    gates = [Gate(), Gate()]
    chief, worker = (peers(store, rank, gate) for rank, gate in enumerate(gates))

    # The chief has asked, and its session is closed before the worker has answered.
    chief.start()
    until(lambda: store.check("message/1"))
    closing = threading.Thread(target=chief.close, args=(60,))
    closing.start()
    worker.start()
    worker.close(60)
    closing.join(60)

    assert not closing.is_alive()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert all(gate.is_last for gate in gates)


def test_a_step_that_waits_for_a_chief_that_is_gone_goes_on(monkeypatch):
    store, gate = TorchStore(dist.HashStore()), Gate()
    gate.meet_chief(1, 1)
    worker = peers(store, 1, gate, is_stopping=False)
    may_begin = []
    step = threading.Thread(target=lambda: may_begin.append(gate.begin(1)), daemon=True)
    step.start()
    until(lambda: gate.is_awaiting_chief)

    # The store is a part of the chief's process.
    monkeypatch.setattr(worker, "_store", TorchStore(GoneStore()))
    worker.start()
    step.join(60)

    assert may_begin == [True]


def test_a_worker_that_a_second_interrupt_has_ended_is_not_waited_for(caplog):
    store = TorchStore(dist.HashStore())
    chief, worker = peers(store, 0, Gate()), peers(store, 1, Gate(), is_impatient=True)

    worker.close(3600)
    chief.start()
    chief.close(3600)

    assert "rank 1 was left by a second Ctrl-C" in caplog.text


@pytest.mark.parametrize("is_stopping", [True, False])
def test_a_chief_that_evaluates_between_two_loops_is_waited_for_in_the_next_step(is_stopping, monkeypatch, caplog):
    store, gates, done = TorchStore(dist.HashStore()), [Gate(), Gate()], [1, 1]
    chief, worker = (
        peers(store, rank, gate, is_stopping=is_stopping, steps_done=lambda rank=rank: done[rank])
        for rank, gate in enumerate(gates)
    )
    # The worker is in the second step, which takes both; the chief has ended a loop after the first.
    gates[0].end(1)
    gates[1].begin(1)
    worker.start()
    met = []

    def meet() -> None:
        if is_stopping:
            chief.start()
            chief._thread.join(60)
        else:
            with chief.meeting("a checkpoint") as states:
                met.append(states)

    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    until(lambda: store.check("message/1/target"))
    # For as long as the evaluation lasts, and no longer: a busy machine may take a while for the rest.
    with monkeypatch.context() as impatient:
        impatient.setattr("stepguard.steps.rendezvous._PATIENCE_SECS", 0.1)
        meeting.join(0.5)
    assert meeting.is_alive()
    assert gates[0].begin(1)
    done[:] = [2, 2]
    meeting.join(60)

    assert not meeting.is_alive()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert met == ([] if is_stopping else [{1: b"state"}])
    chief.close(60)
    worker.close(60)


class GoneStore:
    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError(f"no answer for {keys}")


def peers(
    store: TorchStore,
    rank: int,
    gate: Gate,
    *,
    is_stopping: bool = True,
    is_impatient: bool = False,
    steps_done: Callable[[], int] = lambda: 0,
) -> Rendezvous:
    """Of a run that has not begun its first step, and was asked to stop."""
    member = StubMember(is_stopping, is_impatient, steps_done)
    return Rendezvous(store, rank, 2, gate, member, grace_secs=3600)


@dataclass
class StubMember:
    is_stopping: bool
    impatient: bool
    steps_done: Callable[[], int]

    def process_state(self) -> bytes:
        return b"state"

    def write_part(self, *_: object) -> None:
        pass

    def wait_for_stop(self, _: float) -> object:
        return self.is_stopping

    def should_stop(self) -> bool:
        return self.is_stopping

    def request_stop(self, error: BaseException | None) -> None:
        pass

    def error(self) -> BaseException | None:
        return None

    def is_impatient(self) -> bool:
        return self.impatient


def until(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)
