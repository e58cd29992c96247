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


def peers(store: dist.Store, rank: int, gate: Gate) -> Peers:
    """Of a run that was asked to stop before its first step."""
    return Peers(
        store,
        rank,
        2,
        gate,
        steps_done=lambda: 0,
        process_state=dict,
        wait_for_stop=lambda _: True,
        should_stop=lambda: True,
        request_stop=lambda _: None,
        error=lambda: None,
        write_part=lambda *_: None,
    )


def until(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)
