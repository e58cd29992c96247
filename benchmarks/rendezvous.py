"""What it costs many processes to save and to stop together, against their number.

    python benchmarks/rendezvous.py [--processes 2 16 64 256] [--saves 8] [--idle-secs 5] [--step-secs 0.05]

The store is PyTorch's own, in a process of its own; each of the processes is one client of it with the connections, the
threads and the protocol of the real ones, and no model: several of them share an interpreter (``--hosts``). Counted are
requests to the store and bytes that the chief sends and gets; measured are the time until all know the step of a
checkpoint, the longest time that a step of any process waited for it, and the processor time of the store.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from stepguard.steps.chief import Chief
from stepguard.steps.common_store import CommonStore
from stepguard.steps.gate import Gate, Moment
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.rendezvous import Rendezvous
from stepguard.steps.worker import Worker

# What a process tells the chief of the file that it has written: its size, and its digest.
ANSWER = json.dumps([123_456_789, f"xxh3_128:{'0' * 32}"]).encode()
GRACE_SECS = 60.0


class CountingStore:
    """A common store that counts the requests of one client, and their bytes."""

    def __init__(self, store: CommonStore, counts: dict[str, int] | None = None) -> None:
        self._store = store
        self.counts = {"requests": 0, "names": 0, "values": 0} if counts is None else counts

    def set(self, key: str, value: bytes) -> None:
        self._count(1, [key], [value])
        self._store.set(key, value)

    def claim(self, key: str, value: bytes) -> bytes:
        held = self._store.claim(key, value)
        self._count(1, [key], [value, held])
        return held

    def get(self, keys: Sequence[str]) -> list[bytes]:
        values = self._store.get(keys)
        self._count(1, keys, values)
        return values

    def check(self, key: str) -> bool:
        self._count(1, [key])
        return self._store.check(key)

    def delete(self, key: str) -> None:
        self._count(1, [key])
        self._store.delete(key)

    def wait(self, keys: Sequence[str]) -> None:
        self._count(1, keys)
        self._store.wait(keys)

    def below(self, name: str) -> CountingStore:
        return CountingStore(self._store.below(name), self.counts)

    def _count(self, requests: int, keys: Sequence[str], values: Sequence[bytes] = ()) -> None:
        self.counts["requests"] += requests
        self.counts["names"] += sum(len(key) for key in keys)
        self.counts["values"] += sum(len(value) for value in values)


@dataclass(frozen=True)
class NoPart:
    """The part of a process without a state."""

    moment: Moment
    steps: int


class Process:
    """One process of the training, without a model."""

    def __init__(self, store: CommonStore, rank: int, size: int) -> None:
        self.store = CountingStore(store)
        self.gate = Gate()
        self.longest_wait_secs = 0.0
        self._done = 0
        self._stop = threading.Event()
        self.peers: Rendezvous
        if rank == 0:
            self.peers = Chief(self.store, size, self.gate, self, grace_secs=GRACE_SECS)
        else:
            self.peers = Worker(self.store, rank, size, self.gate, self, grace_secs=GRACE_SECS)
        self.peers.start()

    def step(self) -> None:
        began = time.perf_counter()
        self.gate.begin(self._done)
        self.longest_wait_secs = max(self.longest_wait_secs, time.perf_counter() - began)
        self._done += 1
        self.gate.done(self._done)

    # --- as its rendezvous sees it ---

    def steps_done(self) -> int:
        return self._done

    def moment(self) -> Moment:
        return self.gate.moment(self._done)

    def take_part(self) -> NoPart:
        return NoPart(self.moment(), self._done)

    def write_part(self, messages: PartMessages, _: str, part: Callable[[], NoPart]) -> None:
        part()
        messages.answer("process", ANSWER)

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def wait_for_stop(self, timeout_secs: float) -> object:
        return self._stop.wait(timeout_secs)

    def request_stop(self, _: BaseException | None) -> None:
        self._stop.set()

    def error(self) -> BaseException | None:
        return None

    def is_impatient(self) -> bool:
        return False


def serve(pipe: Connection) -> None:
    """Hold the store."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while pipe.recv() != "end":
        used = os.times()
        pipe.send(used.user + used.system)


def host(pipe: Connection, port: int, ranks: range, size: int, step_secs: float) -> None:
    """Run the processes of ``ranks``, whose steps all begin at the same moments."""
    from torch.distributed import TCPStore

    from stepguard.torch.distributed.world import TorchStore

    def client() -> TorchStore:
        return TorchStore(TCPStore("127.0.0.1", port, is_master=False))

    processes = [Process(client(), rank, size) for rank in ranks]
    pipe.send("there")
    begins_at = pipe.recv()
    is_over = threading.Event()

    def train() -> None:
        number = 0
        while not is_over.wait(max(0.0, begins_at + number * step_secs - time.time())):
            for process in processes:
                process.step()
            number += 1

    training = threading.Thread(target=train)
    training.start()
    while (asked := pipe.recv()) != "end":
        pipe.send(save(processes[0], asked) if asked == "save" else counts(processes))
    is_over.set()
    training.join()
    for process in processes:
        process.gate.turn(process.steps_done())
        process.gate.end(process.steps_done())
    closing = [threading.Thread(target=process.peers.close, args=(GRACE_SECS,)) for process in processes]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def save(process: Process, place: str) -> tuple[float, float]:
    """One checkpoint: the seconds until all know its step, and those until all have written."""
    chief = process.peers
    assert isinstance(chief, Chief)
    began = time.perf_counter()
    with chief.meeting("a checkpoint"):
        agreed, moment = time.perf_counter(), process.moment()
    chief.ask_for_parts(place, moment).collect("process")
    chief.settled()
    return agreed - began, time.perf_counter() - began


def counts(processes: Sequence[Process]) -> dict[str, Any]:
    """What was asked and waited for since the last time."""
    found = {
        "requests": sum(process.store.counts["requests"] for process in processes),
        "names": processes[0].store.counts["names"],
        "values": processes[0].store.counts["values"],
        "wait": max(process.longest_wait_secs for process in processes),
    }
    for process in processes:
        process.store.counts.update(requests=0, names=0, values=0)
        process.longest_wait_secs = 0.0
    return found


@contextmanager
def fleet(size: int, hosts: int, step_secs: float) -> Iterator[tuple[Connection, list[Connection]]]:
    """The store and the hosts, as those who are asked."""
    context = multiprocessing.get_context("spawn")
    started: list[Any] = []

    def start(target: Any, *arguments: Any) -> Connection:
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, *arguments))
        process.start()
        started.append(process)
        return here

    store = start(serve)
    port = store.recv()
    each = -(-size // hosts)
    ranges = [range(first, min(first + each, size)) for first in range(0, size, each)]
    pipes = [start(host, port, ranks, size, step_secs) for ranks in ranges]
    for pipe in pipes:
        pipe.recv()
    begins_at = time.time() + 0.5
    for pipe in pipes:
        pipe.send(begins_at)
    try:
        yield store, pipes
    finally:
        for pipe in pipes:
            pipe.send("end")
        for process in started[1:]:
            process.join(2 * GRACE_SECS)
        store.send("end")
        started[0].join()


def ask(pipes: Sequence[Connection], what: str) -> list[Any]:
    for pipe in pipes:
        pipe.send(what)
    return [pipe.recv() for pipe in pipes]


def measure(size: int, options: argparse.Namespace) -> dict[str, float]:
    with fleet(size, min(options.hosts, size), options.step_secs) as (store, pipes):
        time.sleep(20 * options.step_secs)
        ask(pipes, "counts")
        time.sleep(options.idle_secs)
        idle = ask(pipes, "counts")
        saves, waits, requests, names, values, store_secs = [], [], [], [], [], []
        for _ in range(options.saves):
            used = ask([store], "times")[0]
            saves.append(ask(pipes[:1], "save")[0])
            time.sleep(4 * options.step_secs)
            found = ask(pipes, "counts")
            store_secs.append(ask([store], "times")[0] - used)
            waits.append(max(one["wait"] for one in found))
            requests.append(sum(one["requests"] for one in found))
            names.append(found[0]["names"])
            values.append(found[0]["values"])
    return {
        "processes": size,
        "idle requests a minute": sum(one["requests"] for one in idle) * 60 / options.idle_secs,
        "idle wait, ms": 1000 * max(one["wait"] for one in idle),
        "requests": statistics.median(requests) / size,
        "agreed after, ms": 1000 * statistics.median(agreed for agreed, _ in saves),
        "written after, ms": 1000 * statistics.median(written for _, written in saves),
        "wait, ms": 1000 * statistics.median(waits),
        "bytes at the chief": statistics.median(values) / size,
        "names of keys": statistics.median(names) / size,
        "store, us": 1e6 * statistics.mean(store_secs) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 16, 64, 256])
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--idle-secs", type=float, default=5.0)
    parser.add_argument("--step-secs", type=float, default=0.05)
    parser.add_argument("--hosts", type=int, default=2)
    options = parser.parse_args()
    rows = [measure(size, options) for size in options.processes]
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
