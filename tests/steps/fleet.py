"""Several processes of one training, as threads over a store in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepguard.steps.chief import Chief
from stepguard.steps.common_store import StoreLostError
from stepguard.steps.gate import Gate, Moment
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.rendezvous import Rendezvous
from stepguard.steps.worker import Worker


class MemoryStore:
    """A common store that counts what it is asked."""

    def __init__(self) -> None:
        self.requests = 0
        self.latency_secs = 0.0
        self.waiting = 0
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._is_lost = False

    def set(self, key: str, value: bytes) -> None:
        with self._asked():
            self._values[key] = value
            self._changed.notify_all()

    def claim(self, key: str, value: bytes) -> bytes:
        with self._asked():
            self._changed.notify_all()
            return self._values.setdefault(key, value)

    def get(self, keys: Sequence[str]) -> list[bytes]:
        time.sleep(self.latency_secs)
        with self._asked():
            return [self._values[key] for key in keys]

    def check(self, key: str) -> bool:
        with self._changed:
            return key in self._values

    def delete(self, key: str) -> None:
        with self._asked():
            self._values.pop(key, None)

    def wait(self, keys: Sequence[str]) -> None:
        with self._asked():
            self.waiting += 1
            self._changed.wait_for(lambda: self._is_lost or all(key in self._values for key in keys))
            self.waiting -= 1
            if self._is_lost:
                raise StoreLostError("the store has ended")

    def below(self, name: str) -> Below:
        return Below(self, name)

    def end(self) -> None:
        """As when the process is killed that holds it."""
        with self._changed:
            self._is_lost = True
            self._changed.notify_all()

    def _asked(self) -> threading.Condition:
        self.requests += 1
        if self._is_lost:
            raise StoreLostError("the store has ended")
        return self._changed


class Below:
    """A part of it."""

    def __init__(self, store: MemoryStore, name: str) -> None:
        self._store = store
        self._name = name

    def set(self, key: str, value: bytes) -> None:
        self._store.set(f"{self._name}/{key}", value)

    def claim(self, key: str, value: bytes) -> bytes:
        return self._store.claim(f"{self._name}/{key}", value)

    def get(self, keys: Sequence[str]) -> list[bytes]:
        return self._store.get([f"{self._name}/{key}" for key in keys])

    def check(self, key: str) -> bool:
        return self._store.check(f"{self._name}/{key}")

    def delete(self, key: str) -> None:
        self._store.delete(f"{self._name}/{key}")

    def wait(self, keys: Sequence[str]) -> None:
        self._store.wait([f"{self._name}/{key}" for key in keys])

    def below(self, name: str) -> Below:
        return Below(self._store, f"{self._name}/{name}")


@dataclass(frozen=True)
class StubPart:
    """What a process had done when it was copied."""

    moment: Moment
    steps: int


class StubMember:
    """A process that does nothing in its steps."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._done = 0
        self.reason: str | None = None
        self.impatient = False
        self.epochs = 0
        self.taken: list[int] = []
        self.taken_at: list[Moment] = []
        self.waited_secs = 0.0
        self.copy_secs = 0.0

    def finish_step(self) -> None:
        self._done += 1
        self._gate.done(self._done)

    def steps_done(self) -> int:
        return self._done

    def moment(self) -> Moment:
        return self._gate.moment(self._done)

    def complete_epoch(self) -> None:
        """As a session does at the end of the body of ``sess.epochs``."""
        self.epochs += 1
        self._gate.turn(self._done, self.epochs)
        self._gate.end(self._done)

    def end_loop(self) -> None:
        """As a session does when its data is over."""
        self._gate.turn(self._done)
        self._gate.end(self._done)

    def take_part(self) -> StubPart:
        time.sleep(self.copy_secs)
        self.taken.append(self._done)
        self.taken_at.append(self.moment())
        return StubPart(self.moment(), self._done)

    def write_part(self, messages: PartMessages, place: str, part: Callable[[], StubPart]) -> None:
        try:
            messages.answer("process", str(part().steps).encode())
        except Exception as error:  # noqa: BLE001 - a thread's edge
            messages.answer_error("process", error)

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def wait_for_stop(self, timeout_secs: float) -> object:
        return self._stop.wait(timeout_secs)

    def has_ended(self) -> bool:
        return False

    def stop_reason(self) -> str | None:
        return self.reason

    def request_stop(self, error: BaseException | None, reason: str | None = None) -> None:
        self._error = self._error or error
        self.reason = self.reason or reason
        self._stop.set()

    def error(self) -> BaseException | None:
        return self._error

    def is_collective(self, file: str) -> bool:
        return False

    def is_impatient(self) -> bool:
        return self.impatient


class Fleet:
    """So many of them. They have not begun their first step."""

    def __init__(self, size: int) -> None:
        self.store = MemoryStore()
        self.gates = [Gate() for _ in range(size)]
        self.members = [StubMember(gate) for gate in self.gates]
        self.chief = Chief(self.store, size, self.gates[0], self.members[0], grace_secs=3600)
        workers = [
            Worker(self.store, rank, size, self.gates[rank], self.members[rank], grace_secs=3600)
            for rank in range(1, size)
        ]
        self.peers: list[Rendezvous] = [self.chief, *workers]

    def start(self) -> None:
        for one in self.peers:
            one.start()

    def request_stop(self) -> None:
        for member in self.members:
            member.request_stop(None)

    def ends(self) -> None:
        """The loops come to their ends."""
        for member in self.members:
            member.end_loop()

    def step(self, rank: int) -> None:
        began = time.monotonic()
        assert self.gates[rank].begin(self.members[rank].steps_done())
        self.members[rank].waited_secs = max(self.members[rank].waited_secs, time.monotonic() - began)
        self.members[rank].finish_step()

    def run_steps(self, count: int) -> None:
        for _ in range(count):
            for rank in range(len(self.gates)):
                self.step(rank)

    def step_on_until(self, is_so: Callable[[], object]) -> None:
        training = self.train(step_secs=0.001)
        until(is_so)
        training.stop()

    def train(self, step_secs: float) -> Training:
        return Training(self, step_secs)

    def save(self) -> int:
        with self.chief.meeting("a checkpoint"):
            return 1

    def write(self, moment: Moment | None = None) -> list[int]:
        """Have the others write their parts of ``moment``, or of where the chief is; of which steps these are."""
        moment = moment or self.members[0].moment()
        return [int(one) for one in self.chief.ask_for_parts("place", moment).collect("process")]

    def begin_until_refused(self, rank: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.step(rank)

    def close_in_background(self, rank: int) -> threading.Thread:
        closing = threading.Thread(target=self.peers[rank].close, args=(60,), daemon=True)
        closing.start()
        return closing

    def joined(self, *threads: threading.Thread) -> None:
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def close(self) -> None:
        """All loops have come to their ends, and all sessions are closed."""
        self.ends()
        self.joined(*(self.close_in_background(rank) for rank in reversed(range(len(self.peers)))))


class Training:
    """All of them run steps, in threads of their own, and none is more than a step ahead of another."""

    def __init__(self, fleet: Fleet, step_secs: float) -> None:
        self._fleet = fleet
        self._step_secs = step_secs
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(rank,), daemon=True) for rank in range(len(fleet.gates))
        ]
        for thread in self._threads:
            thread.start()
        # It was the test's own thread until now.
        until(lambda: fleet.gates[0].trainer == self._threads[0].ident)

    def _run(self, rank: int) -> None:
        members = self._fleet.members
        while not self._is_over.wait(self._step_secs):
            self._fleet.step(rank)
            # As after an all-reduce.
            while any(one.steps_done() < members[rank].steps_done() for one in members) and not self._is_over.is_set():
                time.sleep(0.0002)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)
