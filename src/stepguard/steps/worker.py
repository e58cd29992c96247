"""A worker's side of the rendezvous: it does what the chief asks for.

The protocol is explained in :mod:`stepguard.steps.rendezvous`. The listening thread answers at once, and waits for no
other thread. For each checkpoint a thread waits for the training thread to take the state, and writes it; the two share
the lock ``_taking``. One more thread waits for the last step and reports it to the chief. Each of these waits has a
patience.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stepguard.disk.processes import yield_to_others
from stepguard.errors import NoBoundaryError, NonFiniteError
from stepguard.steps.common_store import CommonStore, StoreLostError
from stepguard.steps.copying_budget import CopyingBudget
from stepguard.steps.gate import Gate, Loop, Moment
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.rendezvous import PATIENCE_SECS, Member, Rendezvous, as_error
from stepguard.steps.word_log import Word
from stepguard.words import logger

_log = logger(__name__)


class Worker(Rendezvous):
    """The rendezvous of a process whose rank is not 0."""

    def __init__(
        self, store: CommonStore, rank: int, size: int, gate: Gate, member: Member, *, grace_secs: float
    ) -> None:
        super().__init__(store, rank, size, gate, member, grace_secs=grace_secs)
        self._restored: list[str | None] = []
        self._is_restored = threading.Event()
        # The moment at which this process has last taken its state, the step that the chief has asked for, and the
        # error that prevented the last take.
        self._taken_at: Moment | None = None
        self._asked_for: int | None = None
        self._not_taken: Exception | None = None
        self._taking = threading.Lock()
        self._budget = CopyingBudget()
        self._writing: threading.Thread | None = None
        self._earlier: PartMessages | None = None
        self._answered: str | None = None

    def restored(self) -> str | None:
        """Wait for the name of the checkpoint that the chief has restored; ``None`` if there is none.

        The wait has no limit, because a verification may take any time.

        Raises:
            RuntimeError: a stop was requested, or the chief has ended.
        """
        while not self._is_restored.wait(0.05):
            if self._member.should_stop() or self._is_over.is_set():
                raise RuntimeError("stopped while waiting for the chief to restore the model")
        return self._restored[0]

    def loop_changed(self) -> None:
        """Take the state when a loop ends, before the program may use its streams or the model for something else.

        A process that leaves for good says so when the session is closed.
        """
        if self._gate.loop is Loop.RUNS or not self._gate.is_free:
            return
        # The end of an epoch has changed the state since it was taken at the end of the epoch's loop.
        self._taken_at = None
        if not self._budget.allows_one():
            return
        began = time.monotonic()
        self.take_state()
        self._budget.spend(time.monotonic() - began)

    # --- what the chief says ---

    def _hear(self, word: Word) -> None:
        actions: dict[str, Callable[..., object]] = {
            "restored": self._hear_restored,
            "round": lambda ahead: self._answer("round", word.number, list(self._gate.pause(ahead))),
            "resume": lambda: self._gate.open_until(math.inf),
            "save": self._hear_save,
            "write": lambda step, epochs_done, place: self._start_writing(
                self._part_messages(word.number), (step, epochs_done), place
            ),
            "settled": self._gate.free,
            "passed": self._hear_passed,
            "loop": self._gate.expect_chief,
            "stop_at": lambda step: self._start("stepguard-last", self._come_to_last, word.number, step),
            "last": self._hear_last,
        }
        if word.kind in actions:
            actions[word.kind](*word.content)

    def _hear_restored(self, name: str | None) -> None:
        self._restored.append(name)
        self._is_restored.set()

    def _hear_save(self, step: int, epochs_done: int) -> None:
        self._asked_for = step
        self._gate.capture_at((step, epochs_done))
        self._gate.open_until(math.inf)

    def _hear_passed(self, step: int) -> None:
        self._gate.pass_meeting(step)
        if self._taken_at is not None and self._taken_at[0] == step != self._asked_for:
            self._gate.free()

    def _hear_last(self, sight: list[object] | None, reason: str | None) -> None:
        # Not after `open_until`: a thread that leaves its loop must already know whether the run has ended well.
        self._member.request_stop(as_error(sight), reason)
        self._gate.open_until(self._member.steps_done(), is_last=True)

    def _answer(self, kind: str, number: int, content: object) -> None:
        key = f"{kind}/{number}/{self._rank}"
        self._store.set(key, json.dumps(content).encode())
        # Delete the previous answer, which was read: the store is in the memory of one process during all training.
        if self._answered is not None:
            self._store.delete(self._answered)
        self._answered = key

    def _start(self, name: str, target: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        thread.start()
        return thread

    # --- its part of a checkpoint ---

    def take_state(self) -> None:
        """Copy this process's part of a checkpoint, which the chief may ask for later."""
        self._take(self._member.moment())

    def _take(self, moment: Moment) -> None:
        """Copy the state of ``moment``. Called on the training thread, or on a writing thread if no step follows."""
        with self._taking:
            # The other thread may have been quicker, and training may have gone on.
            if self._taken_at == moment and self._not_taken is None:
                return
            try:
                self._taken_at, self._not_taken = self._member.take_state(), None
            except Exception as error:  # noqa: BLE001 - the chief raises it, and the training goes on
                self._taken_at, self._not_taken = self._member.moment(), error

    def _start_writing(self, messages: PartMessages, moment: Moment, place: str) -> None:
        # On a thread of its own, because the listening thread must be free for the next word, perhaps a stop.
        self._writing = self._start("stepguard-writer", self._write, messages, moment, place)

    def _write(self, messages: PartMessages, moment: Moment, place: str) -> None:
        """Write this process's part. Runs on a thread of its own; an error is sent as the answer."""
        yield_to_others()
        if self._earlier is not None:
            self._earlier.forget()
        self._earlier = messages

        try:
            self._member.write_part(messages, place, self._held(moment))
        except StoreLostError:
            # The store has ended together with the process that holds it, and a launcher is about to end this one too.
            _log.debug("the chief could not be told", exc_info=True)

    @contextmanager
    def _held(self, moment: Moment) -> Iterator[None]:
        """A block in which the state of ``moment`` exists and does not change.

        Raises:
            NoBoundaryError, NonFiniteError: that state was not taken, and will not be.
        """
        self._await_taken(moment)
        with self._taking:
            if isinstance(error := self._member.error(), NonFiniteError):
                raise error
            yield

    def _await_taken(self, moment: Moment) -> None:
        """Wait until the state of ``moment`` is taken; the chief may have come there before this process.

        Raises:
            NoBoundaryError: the state was not taken, and will not be.
        """
        step, epochs_done = moment
        check = self._patience(f"the part of rank {self._rank}", self._grace_secs + PATIENCE_SECS)
        while self._taken_at != moment:
            has_ended = self._gate.loop is Loop.ENDED
            now = self._member.moment()
            if now == moment or (has_ended and now[0] != step):
                # No step follows, or the next has not begun. With uneven inputs it may not be the chief's step.
                self._take(now)
                if self._taken_at == now:
                    break
            if now > moment:
                raise NoBoundaryError(
                    f"rank {self._rank} was past step {step} of this session, with {epochs_done} epochs complete, when "
                    f"it was told of it"
                )
            self._gate.await_change(0.05, lambda: self._member.moment() >= moment or self._taken_at == moment)
            check()
        if self._not_taken is not None:
            raise self._not_taken

    # --- the last step ---

    def _ask_stop(self) -> None:
        self._words.say("stop", self._member.stop_reason(), unless_said=True)

    def _come_to_last(self, number: int, step: int) -> None:
        """Wait until ``step`` steps are done, and answer the chief. Runs on a thread of its own."""
        self._gate.open_until(step)
        try:
            check = self._patience("a stop", self._grace_secs + 30)
            self._await_steps(step, check)
            self._answer("stop", number, self._sight())
        except StoreLostError:
            _log.debug("the common store has ended before the last step", exc_info=True)
        except NoBoundaryError as error:
            _log.warning("the chief asked for a stop, and this process gave up on the last step: %s", error)

    def _say_farewell(self, timeout_secs: float) -> None:
        self._say_if_left()
        if not self._is_over.wait(timeout_secs):
            self._words.say("gone", f"after it had waited {timeout_secs:g} s for the chief to end", unless_said=True)
        writing = self._writing
        if writing is not None:
            # Wait for the writer, even if this process or the chief has failed: its part may complete a checkpoint.
            writing.join(min(timeout_secs, 5.0))
