"""One step of a session of the loop frameworks: how it begins and ends, and what is done between two steps."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import Beginning, Keeper, StepsDone, StepTrace, ValueWatch
from stepguard.errors import StopRequested
from stepguard.steps.boundary import Boundary
from stepguard.steps.digests import numbers_at_hand
from stepguard.steps.feeds import Feed
from stepguard.steps.gate import Gate, Loop, Moment
from stepguard.steps.interrupts import InterruptHold
from stepguard.steps.loop_advice import LoopAdvice
from stepguard.steps.numbers import as_numbers
from stepguard.steps.process_state import ProcessState
from stepguard.steps.step_digests import StepDigests
from stepguard.store.marks import check_name
from stepguard.words import logger

_log = logger(__name__)


class StepSession:
    """Runs and counts single steps, and marks their ends. :class:`stepguard.steps.session.Session` adds the loops.

    A framework's own session gives ``process_state`` its feeds and streams. It may record in :meth:`_step_is_ending`
    facts about a step that its engine needs.
    """

    def __init__(
        self,
        coord: Coordinator,
        write_summary: Callable[[Mapping[str, Any], int], Mapping[str, float] | None],
        process_state: ProcessState,
        *,
        gate: Gate | None = None,
    ) -> None:
        self._global_step = 0
        # The thread that opened the session, until its program has read the step for the first time.
        self._reader: int | None = threading.get_ident()
        self.total_steps: int | None = None
        """The last step of the running loop, if it is known."""
        self.boundary = Boundary()
        """For the engine: the moment between two steps."""
        self.process_state = process_state
        """For the engine: what each process saves of its own."""
        self._coord = coord
        # The gate where the processes of one training wait for each other; ``None`` if there is only one process.
        self._gate = gate
        self._write_summary = write_summary
        self._feed_of_step: Feed | None = None
        self._interrupts = InterruptHold(self.boundary, None if gate is None else lambda: coord.ask_stop("interrupt"))
        process_state.own.is_cut = lambda: self._interrupts.is_impatient
        self._before_close: Callable[[], None] | None = None
        self._watch: ValueWatch | None = None
        self._trace: StepTrace | None = None
        self._digests: StepDigests | None = None
        self._keeper: Keeper | None = None
        self._has_warned_of_no_keeper = False
        self.is_update = True
        """Whether this step ends an update of the model: with ``accumulate``, the last of its batches."""
        self._evaluations = 0
        # Rises at the beginning and at the end of each evaluation.
        self._evaluation_turns = 0
        self._advice = LoopAdvice()
        self.is_open = True
        """Whether the session runs steps still; after :meth:`close` it runs none."""
        self.is_left = False
        """For the engine: whether the loop's body was left in its last step, by ``break`` or by an unknown error."""
        self.is_in_block = False
        """For the engine: whether a `with` block ends the session, and knows the error that has left it."""
        self.is_left_by_error = False
        """For the engine: whether an error has left that step, which no `with` block will tell."""
        # The step that was left without training, until it is known that no error has left it.
        self._left_untrained: int | None = None
        # The step after which the run ends, and the function that asks for the stop there.
        self._end: tuple[int, Callable[[], None]] | None = None

    @property
    def global_step(self) -> int:
        """The number of steps done; inside the first step it is 0. Set by the session alone."""
        if self._reader is not None:
            self._note_reading()
        return self._global_step

    @global_step.setter
    def global_step(self, step: int) -> None:
        self._global_step = step

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation, inside a step or between two loops::

            with sess.evaluating():
                accuracy = evaluate(model)

        Random draws inside the block do not change the training. The block may take any time: it is not reported as a
        hang, and a stop that is requested meanwhile waits for the end of the step. A checkpoint that is due inside a
        step is taken at the step's end; a checkpoint between two loops has the state of the last step.
        """
        self._check_open()
        self._evaluations += 1
        self._evaluation_turns += 1
        try:
            with self.process_state.streams_preserved(), self.process_state.strangers.left_out():
                yield
        finally:
            self._evaluations -= 1
            self._evaluation_turns += 1

    @contextmanager
    def step(self) -> Iterator[int]:
        """Run one training step, in a loop of the program's own::

            while not sv.should_stop():
                with sess.step():
                    train(next(batches))

        The block gets the number of the step. Steps of several threads run one after the other.

        Raises:
            StopRequested: the run must stop at this boundary, as after SIGTERM; ``managed_session`` handles it.
        """
        self.process_state.strangers.look()
        self.process_state.own.come_to_step()
        self.boundary.come_back()
        if self._gate is None and self._interrupts.is_held:
            self.boundary.rest(is_last=True)
            self._interrupts.raise_if_held()
        self._settle()
        self.boundary.call_due()
        if not self._begin():
            self.boundary.rest(is_last=True)
            self._interrupts.raise_if_held()
            raise StopRequested("stopped before the next step: the run ends here, in every process")
        try:
            self.boundary.check_stop()
        except BaseException:
            self.boundary.leave(is_done=False)
            # The state is copied before the program's `finally` runs.
            self.boundary.rest(is_last=True)
            raise
        self._begin_own_step()
        if self._digests is not None:
            self._digests.tell(self.global_step, self.process_state.progress.epochs_done)
        try:
            yield self._global_step
        except StopIteration:
            # The input has ended, so the step had no batch to train with.
            self.boundary.leave(is_done=False)
            self._rest(self._turn_loop, is_stopped=self._is_stopped)
            raise
        except SystemExit:
            # The same as `break` in a loop over steps(): the program ends here because its work is done.
            self.finish_step(was_left=True)
            raise
        except BaseException:
            self.boundary.leave_torn()
            raise
        if self.boundary.is_mine:
            self.finish_step(goes_away=True)
        else:
            # A save has ended it in its middle.
            self.boundary.go_away()
        self._end_own_step()

    def summary(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Write values to the event log, as curves over the global step. Without an event log, do nothing.

        Raises:
            TypeError: a value is no number, and no tensor of one element; the message names its curve.
        """
        numbers = self._write_summary(values, self.global_step if step is None else step)
        # A service reports on a timer, at whatever step that is: only what the thread of the steps reports is compared.
        if self._trace is not None and threading.get_ident() == self.boundary.thread:
            if numbers is None:
                numbers = numbers_at_hand(values)
            is_inside = self.boundary.stepping is not None
            self._trace.numbers(self.global_step, self.process_state.progress.epochs_done, numbers, is_inside)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Note numbers that were measured of the state of the last step, such as a loss on held-out data::

            with sess.evaluating():
                val_loss = evaluate(model)
            sess.metrics({"val_loss": val_loss})

        They are in the manifest of that step's checkpoint, whenever it is saved. With ``Saving(keep_best=...)`` it is
        saved now if it is one of the best. Between two loops it has the state of the last step, whatever the model
        holds meanwhile. Inside a step they belong to the end of this step: measure after the training in it. After a
        block of :meth:`step` the model must be that of the training again.

        Raises:
            TypeError: a value is no number, and no tensor of one element; the message names it.
        """
        self._check_open()
        numbers = as_numbers(values, "metrics")
        if self._watch is not None:
            self._watch.look(numbers, self.global_step)
        self._keep(lambda keeper, step: keeper.metrics(numbers, step))

    def save(self, name: str | None = None) -> None:
        """Save the state of the last step now; with a ``name``, it is kept until ``stepguard unkeep`` takes that away.

        Inside a step it is taken at the end of the step. The files are written in the background. A name that another
        checkpoint has moves to this one, and the other one is kept by its number only.

        Raises:
            TypeError, ValueError: ``name`` is no word.
        """
        self._check_open()
        if name is not None:
            check_name(name)
        if self._keeper is None and self._gate is None and not self._has_warned_of_no_keeper:
            self._has_warned_of_no_keeper = True
            _log.warning("save: this run saves nothing, because it has no logdir or its saving is off")
        self._keep(lambda keeper, step: keeper.save(name, step))

    @property
    def epoch(self) -> int:
        """The number of complete epochs over the loader used last; before its first use, that of the restored run."""
        return self.process_state.epoch

    def close(self) -> None:
        """End the session. A supervisor that still watches it saves the last step first."""
        before_close, self._before_close = self._before_close, None
        if before_close is not None:
            before_close()
        if not self.is_open:
            return
        self.is_open = False
        if not self._coord.failed:
            self._tell_of_untrained()
        self.process_state.close()
        self._interrupts.finish()

    # --- for the engine ---

    def keep_with(self, keeper: Keeper) -> None:
        """Hand ``keeper`` the metrics and saves of the program."""
        self._keeper = keeper

    def watch(self, before_close: Callable[[], None]) -> None:
        """Call ``before_close()`` if the program itself closes the session."""
        self._before_close = before_close

    def watch_values(self, watch: ValueWatch) -> None:
        """Let ``watch`` handle non-finite numbers between two steps, and wait for that."""
        self._watch = watch

    def trace_with(self, trace: StepTrace, digests: StepDigests | None = None) -> Beginning:
        """Tell ``trace`` the numbers of the steps from now on, and have ``digests`` taken. Returns where it begins."""
        self._trace, self._digests = trace, digests
        state = self.process_state
        return Beginning(self.global_step, state.progress.epochs_done, state.processes)

    @property
    def is_evaluating(self) -> bool:
        """Whether the program is inside :meth:`evaluating`. Any thread."""
        return self._evaluations > 0

    @property
    def steps_done(self) -> StepsDone:
        """How far this session has come. Any thread."""
        number, ended_at = self.boundary.last_step
        return StepsDone(number, ended_at, self.boundary.pauses + self._evaluation_turns)

    @property
    def moment(self) -> Moment | None:
        """How far this process is, for the others; ``None`` without others. Any thread."""
        return None if self._gate is None else self._gate.moment(self.boundary.steps)

    @property
    def is_alone(self) -> bool:
        """Whether no other process trains with this one."""
        return self._gate is None

    def defer(self, callback: Callable[[], None]) -> bool:
        """If an evaluation runs inside a step, call ``callback`` at the end of that step, on its thread.

        If the program is between two steps of its own loop, call it before the next step: what the program does there
        is then in the state.
        """
        is_inside = self.is_evaluating and not self.boundary.is_resting
        if not (is_inside or self.boundary.is_away) or self.boundary.is_away_here or self._gate is not None:
            return False
        self.boundary.call_soon(callback)
        return True

    def unwatch(self) -> None:
        """Close without calling ``before_close``."""
        self._before_close = None
        self._watch = None

    def hold_interrupts(self) -> None:
        """Hold Ctrl-C back until the end of the step, from now on. On other threads than the main one, do nothing."""
        self._interrupts.start()

    @property
    def is_cut_short(self) -> bool:
        """Whether an error or a second Ctrl-C has left the last step that the session counts.

        A step that was left by ``break``, with an error after its loop, looks the same and is not saved either.
        """
        return self.is_left and (self._coord.failed or self.boundary.is_torn)

    @property
    def is_impatient(self) -> bool:
        """Whether a second Ctrl-C has ended the run, so that it waits for nothing."""
        return self._interrupts.is_impatient

    def end_at(self, step: int, ask_stop: Callable[[], None]) -> None:
        """Begin no step after ``step``, and call ``ask_stop()`` in place of it: the run ends exactly there."""
        self._end = step, ask_stop
        if self._gate is not None:
            self._gate.end_at(max(0, step - self.global_step))

    def restore_process_state(self, state: Mapping[str, Any], step: int) -> None:
        """Continue at ``step`` from ``state``, which an earlier process has saved."""
        self.global_step = step
        self.process_state.restore(state)
        if self._gate is not None:
            self._gate.begin_at(self.process_state.progress.epochs_done)

    def finish_step(self, *, was_left: bool = False, goes_away: bool = False) -> None:
        """End the step of this thread, if it is in one, because its body was left or asks for a save.

        ``goes_away`` says that it is one of the program's own loop: what is due then comes before the next step.
        """
        if self.boundary.stepping != threading.get_ident():
            return
        feed, self._feed_of_step = self._feed_of_step, None
        if feed is not None:
            feed.consumed()
        self._global_step += 1
        self._step_is_ending()
        self.is_left = was_left
        self.boundary.leave(calls_due=not was_left and not goes_away, goes_away=goes_away)
        if self._gate is not None:
            self._gate.done(self.boundary.steps)
            if was_left:
                self._gate.end(self.boundary.steps, how=Loop.LEFT)
        # After `break` the generator is being closed: an error raised here would be lost. The session's end raises it.
        if self._gate is None and not was_left and not goes_away and self._interrupts.is_held:
            self._interrupts.raise_if_held()

    # --- inside ---

    def _note_reading(self) -> None:
        """Take the first time that the program reads the step, as in ``while sess.global_step < n``, for its loop."""
        reader = sys._getframe(2).f_globals.get("__name__")
        if self._reader == threading.get_ident() and not str(reader).startswith("stepguard."):
            self._reader = None
            self.process_state.come_to_own_loop()

    def _keep(self, act: Callable[[Keeper, int], None]) -> None:
        keeper = self._keeper
        if keeper is None:
            return
        if self.boundary.is_mine:
            step = self.global_step + 1
            self.boundary.call_soon(lambda: act(keeper, step))
            return
        is_away = self.boundary.is_away
        self.boundary.come_back()
        try:
            act(keeper, self.global_step)
        finally:
            if is_away:
                self.boundary.go_away()

    def _begin_own_step(self) -> None:
        """Begin a step of the program's own loop, inside the boundary. A subclass puts the restored state back."""
        self.process_state.begin_own_step()

    def _end_own_step(self) -> None:
        self.process_state.end_own_step(is_due=self.boundary.is_due)

    def _step_is_ending(self) -> None:
        """A hook for a subclass. Called on the thread of the step, while the step still has the boundary."""

    def _has_trained(self) -> bool:
        """A hook for a subclass: whether the running step has trained the model, as far as can be known."""
        return True

    def _tell_of_untrained(self) -> None:
        """Warn of a loop that was left by `break` before it trained with its batch."""
        step, self._left_untrained = self._left_untrained, None
        if step is not None:
            self._advice.on_untrained(step)

    def _settle(self) -> None:
        if self._watch is not None and not self.boundary.is_mine:
            self._watch.settle()

    def _raise_interrupt(self) -> None:
        """Raise a Ctrl-C that was held back, in the program's loop and between two loops."""
        # Until the last step is settled, another process may have begun a step that needs this one.
        if self._gate is None or self._gate.is_last:
            self._interrupts.raise_if_held()

    def _must_end(self, max_steps: int | None) -> bool:
        # With several processes no process ends on its own: the gate closes for all of them after the same step.
        if self._gate is None and (
            (self._end is not None and self._is_at_end()) or self.boundary.must_stop or self._coord.stop_requested
        ):
            return True
        return max_steps is not None and self.global_step >= max_steps

    def _is_at_end(self) -> bool:
        """Whether the run ends at this step; the stop is asked for then."""
        if self._end is None or self.global_step < self._end[0]:
            return False
        self._end[1]()
        return True

    def _check_stop(self) -> None:
        self.boundary.check_stop()
        if self._gate is not None and self._gate.is_last and not self._coord.main_thread_was_told():
            raise StopRequested("stopped before the next loop, as the other processes do")

    def _check_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("this session is closed: run steps inside `with sv.managed_session() as sess:`")

    def _begin(self) -> bool:
        """Enter the next step; ``False`` if no process may."""
        # Every step comes here: what would read better as calls of functions is written out.
        if self._end is not None and self._is_at_end() and self._gate is None:
            return False
        if self._gate is not None and not self._gate.begin(self.boundary.steps):
            return False
        if not self.is_open:
            self._check_open()
        if self.boundary.stepping == threading.get_ident():
            raise RuntimeError("a step was begun inside a step: end the outer one first, or use one loop over steps()")
        if self._left_untrained is not None:
            self._tell_of_untrained()
        self.boundary.enter()
        self.is_left = self.is_left_by_error = False
        self._reader = None
        self.process_state.begin_step()
        if self._digests is not None:
            self._digests.begin_step(self.global_step)
        return True

    @property
    def _is_stopped(self) -> bool:
        return self._coord.stop_requested or self.boundary.must_stop

    def _turn_loop(self) -> None:
        """Count a loop that has ended, inside the boundary."""
        self.process_state.leave_beginning()
        if self._gate is not None:
            self._gate.turn(self.boundary.steps)

    def _rest(self, turn: Callable[[], None], *, is_stopped: bool) -> None:
        """End a loop: code after it, such as an evaluation, is no step that could hang or be waited for.

        ``turn()`` counts the end of the loop, inside the boundary; ``is_stopped`` says that a stop has ended it.
        """
        self.is_update = True
        if not is_stopped:
            self.total_steps = self.global_step
        self.boundary.rest(turn, is_last=is_stopped)
        if self._gate is not None:
            self._gate.end(self.boundary.steps)
        self._raise_interrupt()
