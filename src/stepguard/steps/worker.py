"""A worker's side of the rendezvous: it does what the chief asks for.

The protocol is explained in :mod:`stepguard.steps.rendezvous`. The listening thread answers at once, and waits for no
other thread. For each checkpoint a thread waits until the training thread has taken the part, and writes it. One more
thread waits for the last step and reports it to the chief. Each of these waits has a patience.

Only the training thread takes parts: between two steps of a loop, at the end of a loop before the program goes on, and
when the program has left its block. A part never changes, so no lock protects it. Kept are the one that was asked for,
until its checkpoint is settled, and the one of the last loop's end; also that of the end of the epoch around it,
because the chief may still evaluate, and then save, what its loop has left. A program of many short loops with a
sharded state may take none at the end of a loop; a checkpoint of that moment is then refused.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence

from stepguard.disk.system import yield_to_others
from stepguard.errors import NoBoundaryError, NonFiniteError
from stepguard.steps.common_store import CommonStore, StoreLostError
from stepguard.steps.copying_budget import CopyingBudget
from stepguard.steps.gate import NEVER, Gate, Loop, Moment
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.rendezvous import PATIENCE_SECS, Member, Part, Rendezvous, as_error
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
        # The part that the chief has asked for or may ask for, and that of the last loop's end with the last moment
        # inside of that loop.
        self._captured: Part | None = None
        # The moment of that part, also where it could not be taken; and the last one at which the chief did not save.
        self._came_for: Moment | None = None
        self._passed: Moment | None = None
        self._rested: Part | None = None
        self._rested_before: Part | None = None
        self._ran_to: Moment | None = None
        # Whether a loop has ended, the moment that the chief has asked for, and why the part of a moment was not taken.
        self._has_rested = False
        self._asked_for: Moment | None = None
        self._not_taken: tuple[Moment, Exception] | None = None
        self._budget = CopyingBudget()
        # Whether it was said that this process has done other steps than the chief.
        self._is_uneven = False
        # Set when the program has left its block.
        self._has_left = threading.Event()
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

    def loop_changed(self, *, is_due: bool) -> None:
        """Take the part when a loop ends, before the program may use its streams or the model for something else.

        A process that leaves for good says so when the session is closed.
        """
        if self._gate.loop is Loop.RUNS:
            return
        self._has_rested = True
        # First, so that its memory is reused.
        before, self._rested, self._rested_before = self._rested, None, None
        if before is not None and before.steps == self._member.steps_done():
            self._rested_before = before
        del before
        self._ran_to = self._gate.last_done
        if is_due or self._gate.is_last or self._budget.costs_nothing or self._budget.allows_one():
            began = time.monotonic()
            self._rested = self._take()
            self._budget.spend(time.monotonic() - began)
        if is_due:
            self._captured, self._came_for = self._rested, self._member.moment()
            # As in `take_state`: the word that the chief passes this step may have come while the part was copied.
            self._gate.free(self._takes_passed)

    # --- what the chief says ---

    def _hear(self, word: Word) -> None:
        actions: dict[str, Callable[..., object]] = {
            "restored": self._hear_restored,
            "round": lambda ahead: self._answer(
                "round", word.number, [*self._gate.pause(ahead), self._gate.steps_begun, self._member.steps_done()]
            ),
            "resume": lambda: self._gate.open_until(NEVER),
            "save": self._hear_save,
            "write": lambda moment, steps, place: self._start_writing(
                self._part_messages(word.number), Moment(*moment), steps, place
            ),
            "settled": self._gate.free,
            "passed": self._hear_passed,
            "loop": self._gate.expect_chief,
            "stop_at": lambda moment: self._start("stepguard-last", self._come_to_last, word.number, Moment(*moment)),
            "last": self._hear_last,
        }
        if word.kind in actions:
            actions[word.kind](*word.content)

    def _hear_restored(self, name: str | None) -> None:
        self._restored.append(name)
        self._is_restored.set()

    def _hear_save(self, moment: Sequence[int]) -> None:
        self._asked_for = Moment(*moment)
        self._gate.capture_at(self._asked_for)
        self._gate.open_until(NEVER)

    def _hear_passed(self, step: int, moment: Sequence[int]) -> None:
        self._passed = Moment(*moment)
        self._gate.pass_meeting(step)
        self._gate.free(self._takes_passed)

    def _takes_passed(self) -> bool:
        """Whether the chief does not save what this process came to copy; true once, as for one word."""
        if self._came_for is None or self._came_for != self._passed or self._came_for == self._asked_for:
            return False
        self._passed = None
        return True

    def _hear_last(self, sight: list[object] | None, reason: str | None) -> None:
        # Not after `open_until`: a thread that leaves its loop must already know whether the run has ended well.
        self._member.request_stop(as_error(sight), reason)
        self._gate.open_until(self._member.moment(), is_last=True)

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
        """Take this process's part of a checkpoint, which the chief may ask for later."""
        moment = self._member.moment()
        part = self._part_of(moment)
        if part is None and self._gate.loop is not Loop.RUNS and self._has_rested:
            # The program may have changed the state since its loop has ended.
            self._not_taken = moment, NoBoundaryError(_no_copy(self._rank, moment))
        elif part is None:
            part = self._take()
        self._captured, self._came_for = part, moment
        # The word that the chief passes this step may have come while it was copied, when nothing could be freed yet.
        self._gate.free(self._takes_passed)

    def _take(self) -> Part | None:
        try:
            return self._take_finite()
        except Exception as error:  # noqa: BLE001 - the chief raises it, and the training goes on
            self._not_taken = self._member.moment(), error
            return None

    def _take_finite(self) -> Part:
        # What was seen later says nothing against the part.
        if isinstance(error := self._member.error(), NonFiniteError):
            raise error
        return self._member.take_part()

    def _part_of(self, moment: Moment) -> Part | None:
        return next(
            (
                part
                for part in (self._captured, self._rested, self._rested_before)
                if part is not None and part.moment == moment
            ),
            None,
        )

    def _start_writing(self, messages: PartMessages, moment: Moment, steps: int, place: str) -> None:
        # On a thread of its own, because the listening thread must be free for the next word, perhaps a stop.
        self._writing = self._start("stepguard-writer", self._write, messages, moment, steps, place)

    def _write(self, messages: PartMessages, moment: Moment, steps: int, place: str) -> None:
        """Write this process's part. Runs on a thread of its own; an error is sent as the answer."""
        yield_to_others()
        if self._earlier is not None:
            self._earlier.forget()
        self._earlier = messages

        try:
            self._member.write_part(messages, place, lambda: self._awaited_part(moment, steps))
        except StoreLostError:
            # The store has ended together with the process that holds it, and a launcher is about to end this one too.
            _log.debug("the chief could not be told", exc_info=True)

    def _awaited_part(self, moment: Moment, steps: int) -> Part:
        """The part of ``moment``, at which the chief had done ``steps``; it may have come there before this process.

        Raises:
            NoBoundaryError, NonFiniteError: that part was not taken, and will not be.
        """
        check = self._patience(f"the part of rank {self._rank}", self._grace_secs + PATIENCE_SECS)
        try:
            while (part := self._part_for(moment)) is None:
                self._gate.await_change(0.05, lambda: self._part_of(moment) is not None)
                check()
        except NoBoundaryError:
            # No step has to wait for this part any longer.
            self._gate.free()
            raise
        if part.steps != steps and not self._is_uneven:
            self._is_uneven = True
            _log.warning(
                "this process has done %d steps of this session and rank 0 %d: their inputs are uneven, or they do not "
                "wait for each other in each step. A checkpoint has the model and the optimizers of rank 0, and the "
                "random states and positions of each: after a restart this process goes on with the optimizers of rank "
                "0, which is the same run only if they depend on no count of steps, as SGD without momentum",
                part.steps,
                steps,
            )
        return part

    def _part_for(self, moment: Moment) -> Part | None:
        """The part that belongs to ``moment``; ``None`` if this process has yet to come there.

        Raises:
            NoBoundaryError: the part was not taken, and will not be.
        """
        now, has_left = self._member.moment(), self._has_left.is_set()
        part, not_taken, rested = self._part_of(moment), self._not_taken, self._rested
        if part is not None:
            return part
        if not_taken is not None and not_taken[0] == moment:
            raise not_taken[1]
        if now > moment:
            if rested is not None and self._is_end_of_the_loop_of(moment, rested.moment):
                return rested
            raise NoBoundaryError(
                f"rank {self._rank} was past {_shown(moment)} of this session when it was told of it, because the "
                f"processes do not wait for each other in each step. The next checkpoint is tried as usual"
            )
        if has_left and now < moment and rested is not None and rested.moment == now:
            # The run was stopped before this process had done all the steps of a loop that has ended in the chief.
            return rested
        if has_left and now <= moment:
            if self._has_rested and self._member.should_stop():
                raise NoBoundaryError(_no_copy(self._rank, moment))
            # The program is over, and the state is as it leaves it.
            return self._take_finite()
        return None

    def _is_end_of_the_loop_of(self, moment: Moment, ended_at: Moment) -> bool:
        """Whether the loop of ``moment`` has ended here at ``ended_at``, with fewer steps: uneven inputs."""
        has_fewer = self._ran_to is None or self._ran_to < moment
        return has_fewer and moment.steps > 0 and ended_at == Moment(moment.epochs, moment.loops + 1, 0)

    # --- the last step ---

    def _ask_stop(self) -> None:
        self._words.say("stop", self._member.stop_reason(), unless_said=True)

    def _come_to_last(self, number: int, moment: Moment) -> None:
        """Wait until this process is at ``moment``, and answer the chief. Runs on a thread of its own."""
        self._gate.open_until(moment)
        try:
            check = self._patience("a stop", self._grace_secs + 30)
            self._await_moment(moment, check)
            self._answer("stop", number, self._sight())
        except StoreLostError:
            _log.debug("the common store has ended before the last step", exc_info=True)
        except NoBoundaryError as error:
            _log.warning("the chief asked for a stop, and this process gave up on the last step: %s", error)

    def _say_farewell(self, timeout_secs: float) -> None:
        self._has_left.set()
        self._say_if_left()
        if not self._is_over.wait(timeout_secs):
            self._words.say("gone", f"after it had waited {timeout_secs:g} s for the chief to end", unless_said=True)
        writing = self._writing
        if writing is not None:
            # Wait for the writer, even if this process or the chief has failed: its part may complete a checkpoint.
            writing.join(min(timeout_secs, 5.0))


def _no_copy(rank: int, moment: Moment) -> str:
    return (
        f"rank {rank} has not copied its part at the end of its loop, {_shown(moment)} of this session: copies of the "
        f"sharded state at the ends of short loops take at most a twentieth of the time"
    )


def _shown(moment: Moment) -> str:
    place = f"epoch {moment.epochs}, loop {moment.loops}"
    return f"{place}, step {moment.steps}" if moment.steps else f"the beginning of {place}"
