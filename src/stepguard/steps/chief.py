"""The chief's side of the rendezvous: it opens the rounds, and asks for the parts of a checkpoint.

The protocol is explained in :mod:`stepguard.steps.rendezvous`. Three threads run this code: the thread that saves (a
timer's or the training thread), the thread that settles the last step, and the listening thread, which starts the
second. The first two take turns by the lock ``_rounds``, and each of their waits for answers has a patience. The
listening thread never takes that lock and so never waits for them. What a kill leaves is explained there too.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from stepguard.errors import NoBoundaryError
from stepguard.steps.common_store import CommonStore, StoreLostError
from stepguard.steps.gate import NEVER, Gate, Loop, Moment
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.rendezvous import PATIENCE_SECS, Member, Rendezvous, as_error
from stepguard.steps.word_log import Word
from stepguard.words import logger

_log = logger(__name__)

# A generous estimate of the length of a round, used before the first round.
_ROUND_SECS = 0.05
_ROUND_SECS_OF_A_PROCESS = 0.0001
_MOST_STEPS_AHEAD = 100_000
# How long a training thread that itself asks for a save waits for the others to come to its step.
_HERE_SECS = 5.0
_LOOK_SECS = 0.05
# A process that has begun a step may find that its data has ended, so it is asked again, at growing intervals.
_ASK_AGAIN_SECS = 0.02
_ASK_AGAIN_AT_MOST_SECS = 5.0


class Chief(Rendezvous):
    """The rendezvous of the process of rank 0."""

    def __init__(self, store: CommonStore, size: int, gate: Gate, member: Member, *, grace_secs: float) -> None:
        super().__init__(store, 0, size, gate, member, grace_secs=grace_secs)
        self._rounds = threading.Lock()
        self._round_secs = _ROUND_SECS + size * _ROUND_SECS_OF_A_PROCESS
        # The number of steps at the last snapshot, and whether the others still keep their states of that moment.
        self._taken_at: int | None = None
        self._is_wanted = False
        # The thread and the step at which a training thread stands where all others take their states unasked.
        self._knows_steps = False
        self._met_at: tuple[int, int] | None = None
        # Whether it was said that this process had fewer batches than another.
        self._is_shorter = False
        self._starting = threading.Lock()
        self._settling: threading.Thread | None = None
        # Who asked another process to stop, which has asked all for it.
        self._asked_by: str | None = None

    def say_restored(self, name: str | None) -> None:
        """Tell the others which checkpoint was restored, or that there is none."""
        self._words.say("restored", name)

    def take_state(self) -> None:
        """Do nothing: the state of this process is in the snapshot itself."""

    def loop_changed(self, *, is_due: bool) -> None:  # noqa: ARG002 - for processes that write only a part
        """If all processes know the steps of the checkpoints, tell the others whether the chief will come to them."""
        if self._knows_steps:
            self._say("loop", self._gate.loop is not Loop.ENDED)

    # --- checkpoints ---

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """A block in which this process stands after the step at which all others take their states.

        Raises:
            NoBoundaryError: there is no such step, or it did not come in time.
        """
        if self._met_at == (threading.get_ident(), self._member.steps_done()):
            if self._is_wanted:
                # The others wait here, because the previous checkpoint may still need the states that they hold.
                self._words.say("save", self._member.moment())
            self._note_taken()
            yield
            return
        with self._rounds:
            try:
                self._agree(what)
                self._note_taken()
                yield
            finally:
                self._gate.open_until(NEVER)

    def _note_taken(self) -> None:
        self._taken_at, self._is_wanted = self._member.steps_done(), True

    def at_known_step(self, callback: Callable[[], int]) -> int:
        """Call ``callback``, which may save, after a step at which all others take their states unasked."""
        step, moment = self._member.steps_done(), self._member.moment()
        self._knows_steps = True
        self._met_at = threading.get_ident(), step
        try:
            return callback()
        finally:
            self._met_at = None
            if self._taken_at != step:
                self._say("passed", step, moment)

    def settled(self) -> None:
        """Tell the others that the last snapshot is committed, so that they can free their states of it."""
        if self._is_wanted:
            self._is_wanted = False
            self._say("settled")

    def ask_for_parts(self, place: str, moment: Moment) -> PartMessages:
        """Ask the others to write their parts of the last snapshot to ``place``, which is relative to the logdir.

        ``moment`` is that of the snapshot.
        """
        return self._part_messages(self._words.say("write", moment, self._taken_at, place))

    def _say(self, kind: str, *content: object) -> None:
        """Say a word, and ignore a lost store: the next collective operation reports that the others have ended."""
        with contextlib.suppress(StoreLostError):
            self._words.say(kind, *content)

    def _agree(self, what: str) -> None:
        """Open a round and go to its step. This process then waits there; the others do not wait."""
        # A training thread cannot go to another step from here.
        is_here = self._gate.trainer == threading.get_ident()
        patience_secs = _HERE_SECS if is_here else self._grace_secs + PATIENCE_SECS
        check = self._patience(f"{what}: another process has begun a step that this one has not", patience_secs)
        try:
            self._go_to_agreed_step(what, check, is_here=is_here)
        except NoBoundaryError:
            self._say("resume")
            raise

    def _go_to_agreed_step(self, what: str, check: Callable[[], None], *, is_here: bool) -> None:
        pause_secs = _ASK_AGAIN_SECS
        while True:
            moment, have_ended = self._ask(what, 0 if is_here else self._steps_ahead())
            is_there = moment <= self._member.moment() or have_ended
            if is_there or not (is_here or self._gate.is_resting):
                # The processes that are behind come to the moment where this process is.
                moment = self._member.moment() if is_there else moment
                self._words.say("save", moment)
                self._gate.open_until(moment)
                if is_there or self._has_come_to(moment, what):
                    return
            self._words.say("resume")
            self._gate.open_until(NEVER)
            # This process is between two loops. The others may be in a step that needs it, and wait for it.
            self._gate.await_change(pause_secs, lambda: not self._gate.is_resting and not is_here)
            pause_secs = min(2 * pause_secs, _ASK_AGAIN_AT_MOST_SECS)
            check()

    def _ask(self, what: str, ahead: int) -> tuple[Moment, bool]:
        """Ask every process for its limit; return the first moment that all can reach, and whether all loops are over.

        With uneven inputs, a process whose data has ended comes to no further step of this loop. If all have begun as
        many steps, the others will find at the next one that theirs has ended too.
        """
        began = time.monotonic()
        promises = [(*self._gate.pause(ahead), self._gate.steps_begun, self._member.steps_done())]
        number = self._words.say("round", ahead)
        answers = self._gather([f"round/{number}/{rank}" for rank in self._others()], what)
        promises += [(Moment(*limit), *rest) for limit, *rest in map(json.loads, answers)]
        self._round_secs = 2 * (time.monotonic() - began)
        limits = [limit for limit, *_ in promises]
        running = [limit for limit, has_ended, *_ in promises if not has_ended]
        is_even = len({begun for _, _, begun, _ in promises}) == 1
        mine, has_ended, *_ = promises[0]
        if has_ended:
            self._warn_if_shorter([steps if limit <= mine else 0 for limit, _, _, steps in promises])
        return max(running if running and not is_even else limits), not running

    def _warn_if_shorter(self, steps: Sequence[int]) -> None:
        """Warn if another process has trained steps that this process, whose model is saved, had no batches for."""
        if max(steps) > steps[0] and not self._is_shorter:
            self._is_shorter = True
            _log.warning(
                "rank %d has trained %d steps of this session and rank 0, whose model is saved, %d: what was trained "
                "after the data of rank 0 had ended is not in the checkpoint. Give rank 0 at least as many batches as "
                "the others",
                steps.index(max(steps)),
                max(steps),
                steps[0],
            )

    def _steps_ahead(self) -> int:
        """The number of steps that are run while the answers travel, so that no process has to wait."""
        steps = self._round_secs / max(self._gate.step_secs, 1e-9)
        return math.ceil(min(steps, _MOST_STEPS_AHEAD))

    def _has_come_to(self, moment: Moment, what: str) -> bool:
        """Wait until this process is at ``moment``; ``False`` if its loop rests before that."""
        gate, member = self._gate, self._member
        done = member.moment()
        check = self._patience(self._under_way(what))
        while (now := member.moment()) < moment:
            if gate.is_resting:
                return False
            if now > done:
                done, check = now, self._patience(self._under_way(what))
            gate.await_change(_LOOK_SECS, lambda: member.moment() >= moment)
            check()
        return True

    def _under_way(self, what: str) -> str:
        return f"{what}: step {self._member.steps_done() + 1} of this session is still under way in rank 0"

    # --- the last step ---

    def _hear(self, word: Word) -> None:
        if word.kind == "stop":
            (self._asked_by,) = word.content
            self._start_settling()

    def _ask_stop(self) -> None:
        self._start_settling()

    def _start_settling(self) -> threading.Thread:
        with self._starting:
            if self._settling is None:
                self._settling = threading.Thread(target=self._settle_last_step, name="stepguard-last", daemon=True)
                self._settling.start()
            return self._settling

    def _settle_last_step(self) -> None:
        """Agree on the last step, and tell all processes to stop there. Runs on a thread of its own."""
        if self._closing.is_set():
            return
        # No round may open between the last step and the closing of the gates.
        with self._rounds:
            sight = self._met_last()
            reason = self._member.stop_reason() or self._asked_by
            self._say("last", sight, reason)
            # Not earlier: a thread that leaves its loop must already know whether the run has ended well.
            self._member.request_stop(as_error(sight), reason)
            self._gate.open_until(self._member.moment(), is_last=True)

    def _met_last(self) -> list[object] | None:
        """Wait until all have come to the last step; return the non-finite values that one of them has seen, if any."""
        what = "a stop"
        # After an error, perhaps the loss of a process, there is nothing to agree on.
        if self._has_failed():
            return None
        try:
            check = self._patience(what, self._grace_secs + PATIENCE_SECS)
            moment, _ = self._ask(what, 0)
            number = self._words.say("stop_at", moment)
            self._gate.open_until(moment)
            self._await_moment(moment, check)
            keys = [f"stop/{number}/{rank}" for rank in self._others()]
            sights = [json.loads(one) for one in self._gather(keys, what, self._grace_secs + PATIENCE_SECS)]
        except NoBoundaryError as error:
            _log.warning("stopping without the others: %s", error)
            return None
        return next((one for one in (self._sight(), *sights) if one is not None), None)

    def close(self, timeout_secs: float) -> None:
        """Settle the last step with the others, then stop listening."""
        super().close(timeout_secs)
        with self._starting:
            settling = self._settling
        if settling is not None:
            settling.join(timeout_secs)

    def _say_farewell(self, timeout_secs: float) -> None:
        if self._member.should_stop() and self._gate.loop is not Loop.LEFT and not self._has_failed():
            self._start_settling().join(timeout_secs)
        self._say_if_left()
        self._words.say("over", unless_said=True)

    def _others(self) -> range:
        return range(1, self._size)
