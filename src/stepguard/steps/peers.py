"""The steps that an engine takes together with the engines of the other processes, session after session."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from stepguard.steps.chief import Chief
from stepguard.steps.common_store import CommonStore
from stepguard.steps.gate import Gate, Moment
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.rendezvous import Member
from stepguard.steps.session import Session
from stepguard.steps.worker import Worker


class Peers:
    """The other processes of one Supervisor. Without a ``store`` there are none, and this process acts alone.

    Threads: the thread of the session calls ``open`` and ``close``; any thread calls the other methods.
    """

    def __init__(self, store: CommonStore | None, rank: int, size: int, *, grace_secs: float) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._grace_secs = grace_secs
        self._sessions = 0
        self._rendezvous: Chief | Worker | None = None
        self._knows_steps = False

    @property
    def has_any(self) -> bool:
        """Whether other processes exist and a session with them is open."""
        return self._rendezvous is not None

    def gate(self) -> Gate | None:
        """A new gate, where the steps of the next session wait for the others; ``None`` without others."""
        return None if self._store is None else Gate()

    def open(self, gate: Gate | None, member: Callable[[], Member]) -> None:
        """Listen to the others in the session of ``gate``. All processes must open their sessions in the same order."""
        self._sessions += 1
        self._knows_steps = False
        if self._store is None or gate is None:
            return
        store = self._store.below(f"session/{self._sessions}")
        if self.rank == 0:
            self._rendezvous = Chief(store, self.size, gate, member(), grace_secs=self._grace_secs)
        else:
            self._rendezvous = Worker(store, self.rank, self.size, gate, member(), grace_secs=self._grace_secs)
        self._rendezvous.start()

    def close(self) -> None:
        """Close the session with the others.

        The chief first settles the last step with the others; a worker first waits until the chief is done.
        """
        rendezvous, self._rendezvous = self._rendezvous, None
        if rendezvous is not None:
            rendezvous.close(self._grace_secs)

    def restored(self, restore_newest: Callable[[], str | None], restore_named: Callable[[str], None]) -> str | None:
        """Restore the same checkpoint in all processes; return its name, or ``None`` if there is none.

        The chief restores the newest, and the others the one that the chief names.

        Raises:
            RuntimeError: a stop was requested during the wait for the chief, or the chief has ended.
        """
        if isinstance(self._rendezvous, Worker):
            name = self._rendezvous.restored()
            if name is not None:
                restore_named(name)
            return name
        name = restore_newest()
        if self._rendezvous is not None:
            self._rendezvous.say_restored(name)
        return name

    def meet_every(self, steps: int, gate: Gate | None, global_step: int) -> None:
        """Have all processes take their states after each ``steps`` steps, so that the chief can save exactly there."""
        self._knows_steps = True
        if gate is not None and self.rank > 0:
            gate.meet_every(steps - global_step % steps, steps)

    def saving(self, session: Session, callback: Callable[[], int]) -> Callable[[], int]:
        """The function to call at boundaries in place of ``callback``, which may enter :meth:`meeting`."""
        if self._rendezvous is None:
            return callback
        if isinstance(self._rendezvous, Chief) and self._knows_steps:
            return functools.partial(self._rendezvous.at_known_step, callback)
        # The callback waits for the others, and they may need the next step of this process to get to that step.
        return _InBackground(session, callback)

    def meeting(self, what: str) -> AbstractContextManager[None]:
        """A block in which this process stands after the step at which all others take their states.

        Raises:
            NoBoundaryError: there is no such step, or it did not come in time.
        """
        return self._rendezvous.meeting(what) if isinstance(self._rendezvous, Chief) else nullcontext()

    def saves_rest(self) -> None:
        """Note that the state of this process's last rest is about to be written."""
        if isinstance(self._rendezvous, Chief):
            self._rendezvous.note_rest()

    def ask_for_parts(self, place: str, moment: Moment | None) -> PartMessages | None:
        """Ask the others to write their parts of the last snapshot to ``place``, which is relative to the logdir.

        ``moment`` is that of the snapshot; ``None`` without others.
        """
        if moment is None or not isinstance(self._rendezvous, Chief):
            return None
        return self._rendezvous.ask_for_parts(place, moment)

    def settled(self) -> None:
        """Tell the others that the last snapshot is committed, so that they can free their states of it."""
        if isinstance(self._rendezvous, Chief):
            self._rendezvous.settled()


class _InBackground:
    """Calls ``callback`` on a thread of its own, and checks at each step whether it has returned."""

    def __init__(self, session: Session, callback: Callable[[], int]) -> None:
        self._session = session
        self._callback = callback
        self._thread: threading.Thread | None = None
        self._next_at = 0

    def __call__(self) -> int:
        steps = self._session.boundary.steps
        if self._thread is None:
            self._thread = threading.Thread(target=self._call, args=(steps,), name="stepguard-save", daemon=True)
            self._thread.start()
            return 1
        if self._thread.is_alive():
            return 1
        self._thread = None
        return max(1, self._next_at - steps)

    def _call(self, steps: int) -> None:
        self._next_at = steps + self._callback()
