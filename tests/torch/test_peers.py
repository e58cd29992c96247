"""The rounds of several processes, with the processes as threads: what depends on who comes first."""

from __future__ import annotations

import logging
import threading
import time

import torch.distributed as dist

from stepguard.torch.peers import Gate, Peers


def test_a_chief_that_is_closed_settles_the_last_step_first(caplog):
    store = dist.HashStore()
    gates = [Gate(), Gate()]
    chief, worker = (peers(store, rank, gate) for rank, gate in enumerate(gates))

    # The chief has asked, and its session is closed before the worker has answered.
    chief.start()
    until(lambda: store.check(["message/1"]))
    closing = threading.Thread(target=chief.close, args=(60,))
    closing.start()
    worker.start()
    worker.close(60)
    closing.join(60)

    assert not closing.is_alive()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert all(gate.is_last for gate in gates)


def test_a_step_that_waits_for_a_chief_that_is_gone_goes_on(monkeypatch):
    store, gate = dist.HashStore(), Gate()
    gate.meet_chief(1, 1)
    worker = peers(store, 1, gate, is_stopping=False)
    may_begin = []
    step = threading.Thread(target=lambda: may_begin.append(gate.begin(1)), daemon=True)
    step.start()
    until(lambda: gate.is_awaiting_chief)

    # The store is a part of the chief's process.
    monkeypatch.setattr(worker, "_store", GoneStore())
    worker.start()
    step.join(60)

    assert may_begin == [True]


def test_a_worker_that_a_second_interrupt_has_ended_is_not_waited_for(caplog):
    store = dist.HashStore()
    chief, worker = peers(store, 0, Gate()), peers(store, 1, Gate(), is_impatient=True)

    worker.close(3600)
    chief.start()
    chief.close(3600)

    assert "rank 1 was left by a second Ctrl-C" in caplog.text


class GoneStore:
    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError(f"no answer for {keys}")


def peers(store: dist.Store, rank: int, gate: Gate, *, is_stopping: bool = True, is_impatient: bool = False) -> Peers:
    """Of a run that has not begun its first step, and was asked to stop."""
    return Peers(
        store,
        rank,
        2,
        gate,
        steps_done=lambda: 0,
        process_state=dict,
        wait_for_stop=lambda _: is_stopping,
        should_stop=lambda: is_stopping,
        request_stop=lambda _: None,
        error=lambda: None,
        is_impatient=lambda: is_impatient,
        write_part=lambda *_: None,
    )


def until(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)
