"""The session of the loop frameworks, which the ``with`` block gets: it runs and counts steps, and marks their ends."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import Beginning, StepTrace, ValueWatch
from stepguard.errors import StopRequested
from stepguard.steps.boundary import Boundary
from stepguard.steps.digests import numbers_at_hand
from stepguard.steps.feeds import Feed, shown
from stepguard.steps.gate import Gate, Loop, Moment
from stepguard.steps.interrupts import InterruptHold
from stepguard.steps.loop_advice import LoopAdvice, LoopPlan
from stepguard.steps.process_state import ProcessState
from stepguard.steps.step_digests import StepDigests


class Session:
    """A run of a training program, from its start or restart to its stop.

    ``global_step`` is the number of steps done; inside the first step it is 0. :meth:`steps` runs many steps,
    :meth:`step` runs one. ``is_update`` is false in all turns of an accumulation but the last.

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
        self.global_step = 0
        # The last step of the running loop, if it is known.
        self.total_steps: int | None = None
        self.boundary = Boundary()
        self.process_state = process_state
        self._coord = coord
        # The gate where the processes of one training wait for each other; ``None`` if there is only one process.
        self._gate = gate
        self._write_summary = write_summary
        self._feed_of_step: Feed | None = None
        self._interrupts = InterruptHold(self.boundary, None if gate is None else lambda: coord.ask_stop("interrupt"))
        self._before_close: Callable[[], None] | None = None
        self._watch: ValueWatch | None = None
        self._trace: StepTrace | None = None
        self._digests: StepDigests | None = None
        self.is_update = True
        # The number of loops begun in the body of `epochs`; ``None`` outside.
        self._loops_begun: int | None = None
        self._epochs_wanted = 0
        # Whether a stop or `max_steps` has ended a loop before its end, so that the epoch around it is not complete;
        # and the `max_steps` that ends the loop over epochs after this body.
        self._is_cut = False
        self._ended_by: int | None = None
        self._evaluations = 0
        # The function that puts the restored state back, until the first step; and whether a loop was begun.
        self._put_back: Callable[[], None] | None = None
        self._has_begun_loop = False
        self._advice = LoopAdvice()
        # The error by which a loader has failed to give the batch of a step that had not begun.
        self.failed_fetch: BaseException | None = None
        self.is_open = True
        # Whether the loop's body was left in its last step: by `break`, or by an error that is not known yet.
        self.is_left = False
        # The step that was left without training, until it is known that no error has left it.
        self._left_untrained: int | None = None
        # The step after which the run ends, and the function that asks for the stop there.
        self._end: tuple[int, Callable[[], None]] | None = None

    def steps(
        self,
        loader: Any = None,
        *,
        max_steps: int | None = None,
        epochs: int | None = None,
        accumulate: int = 1,
        resume_data: bool | str = True,
    ) -> Iterator[Any]:
        """The batches of ``loader``, one for each training step; without a loader the numbers of the steps.

        The body of the loop is the step. A step counts as done when the next one is asked for, or when the body is left
        by ``break``. The iterator ends when a stop was requested, at ``max_steps``, and after ``epochs``. Without these
        two it begins one epoch after the other. In the body of :meth:`epochs` it ends with the epoch.

        Asking for the next step ends the current one, so nothing may ask ahead. A prefetcher around this iterator
        counts steps that were never trained. So does ``zip(sess.steps(loader), range(4))``, which asks for a fifth step
        before it sees the end of ``range``, and ``break`` before the training with a batch. Prefetch in the loader, and
        end a loop with ``max_steps``, or with ``break`` after the training. A warning is given if another thread asks
        for steps, and, where the framework's session can know it, if the last step of a loop has trained nothing.

        While no loop runs, the program may use the state for other work. A save then has the state of the last step.

        Args:
            loader: a loader of the framework, one with ``state_dict``, or any other iterable; a mapping or a sequence
                of loaders, of which each step gets one batch each; or a function that makes an iterable for each epoch.
            max_steps: the global step at which the loop ends; steps done before a restart count. In the body of
                :meth:`epochs` it also ends the epochs, after this body. Without a loader, or over one without a
                length, it ends only the epoch, so that ``max_steps=(epoch + 1) * 1000`` is an epoch of 1000 steps.
            epochs: the number of epochs over this loader in all; those before a restart count.
            accumulate: how many batches, each a turn of the loop, make one step; fewer at the end of an epoch.
                ``is_update`` is true in the last turn of a step: call the optimizer there.
            resume_data: whether a restarted run continues with the batch after the last one that was seen. With
                ``False`` it begins a new epoch, for a loader that has changed; the number of the epoch is kept, and
                later starts go on in that epoch. With ``"unchecked"`` it goes on where the position is not sure to fit,
                with a warning instead of an error.

        Raises:
            CheckpointMismatchError: the checkpoint was saved with another loader, or by another number of processes
                whose shares of the data cannot be known.
            StopRequested: SIGTERM has ended an earlier loop; ``managed_session`` handles it. Not raised if the program
                has called ``should_stop()`` since then, because it then ends by itself.
        """
        self._check_open()
        self._check_stop()
        _check_count("steps", "max_steps", max_steps)
        _check_count("steps", "epochs", epochs)
        _check_count("steps", "accumulate", accumulate, least=1)
        if resume_data not in (True, False, "unchecked"):
            raise ValueError(f'steps: expected resume_data to be True, False or "unchecked", found {resume_data!r:.80}')
        feed = self._feed(loader, epochs, resume_data)
        number = self._loops_begun
        if number is not None:
            if epochs is not None:
                raise ValueError("steps: inside sess.epochs() the loop ends with the epoch; leave epochs= out")
            self._loops_begun = number + 1
        until_epoch = self._until_epoch(feed, epochs)
        wanted = until_epoch if number is None else self._epochs_wanted
        self.total_steps = _total_steps(feed, max_steps, wanted, accumulate)
        plan = LoopPlan(feed, max_steps, until_epoch, accumulate, number, epochs, threading.get_ident())
        self._advice.on_begin(plan, is_first=feed is not None and feed.loops == 1)
        return self._steps(plan)

    def epochs(self, number: int) -> Iterator[int]:
        """The numbers of the remaining epochs out of ``number``; the body may do work at the end of each epoch::

            for epoch in sess.epochs(10):
                for batch in sess.steps(loader):
                    train(batch)
                evaluate()
                scheduler.step()

        A loop over ``steps`` in the body ends with the epoch of its loader. An epoch is complete when its body is
        complete. After a restart in the middle of an epoch the run continues with the next batch. After a restart
        during the work at an epoch's end, only that work is done again. A complete epoch is not done again. ``break``
        leaves the epoch incomplete.

        Raises:
            StopRequested: raised by ``steps`` if SIGTERM stops the run in the middle of an epoch, so that the work at
                the epoch's end is not done.
        """
        self._check_open()
        self._check_stop()
        _check_count("epochs", "number", number)
        if number is None:
            raise TypeError("epochs: expected the number of epochs, found None")
        if self._loops_begun is not None:
            raise RuntimeError("epochs: expected no loop over epochs around it, found one")
        self.process_state.adopt_epochs()
        return self._epochs(number)

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch of this step is the last of its epoch.

        Raises:
            RuntimeError: no step over a loader is running.
            TypeError: the loader has no length.
        """
        feed = self._feed_of_step
        if feed is None:
            raise RuntimeError("is_last_batch: expected a step of sess.steps(loader) to run, found none")
        is_last = feed.is_last_batch
        if is_last is None:
            raise TypeError(
                f"is_last_batch: expected a loader with a length, found {shown(feed.loader)} without: put what belongs "
                f"to the end of an epoch after the inner loop of `for epoch in sess.epochs(n)`"
            )
        return is_last

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
        try:
            with self.process_state.streams_preserved():
                yield
        finally:
            self._evaluations -= 1

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
        self.boundary.come_back()
        self._settle()
        self.boundary.call_due()
        if not self._begin():
            self._interrupts.raise_if_held()
            raise StopRequested("stopped before the next step: the run ends here, in every process")
        try:
            self.boundary.check_stop()
        except BaseException:
            self.boundary.leave(is_done=False)
            raise
        if self._digests is not None:
            self._digests.tell(self.global_step, self.process_state.epochs_done)
        try:
            yield self.global_step
        except StopIteration:
            # The input has ended, so the step had no batch to train with.
            self.boundary.leave(is_done=False)
            self._end_loop()
            raise
        except SystemExit:
            # The same as `break` in a loop over steps(): the program ends here because its work is done.
            self.finish_step(was_left=True)
            raise
        except BaseException:
            self.boundary.leave_torn()
            raise
        self.finish_step()
        self.boundary.go_away()
        if self._gate is None:
            self._interrupts.raise_if_held()

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
            self._trace.numbers(self.global_step, self.process_state.epochs_done, numbers, is_inside)

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
        return Beginning(self.global_step, state.epochs_done, state.processes)

    @property
    def is_evaluating(self) -> bool:
        """Whether the program is inside :meth:`evaluating`. Any thread."""
        return self._evaluations > 0

    @property
    def moment(self) -> Moment | None:
        """How far this process is, for the others; ``None`` without others. Any thread."""
        return None if self._gate is None else self._gate.moment(self.boundary.steps)

    @property
    def is_alone(self) -> bool:
        """Whether no other process trains with this one."""
        return self._gate is None

    def defer(self, callback: Callable[[], None]) -> bool:
        """If an evaluation runs inside a step, call ``callback`` at the end of that step, on its thread."""
        if not self.is_evaluating or self.boundary.is_resting or self._gate is not None:
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

    def put_back_with(self, put_back: Callable[[], None]) -> None:
        """Set the function that resets the program's objects to the state that the session was restored with."""
        self._put_back = put_back

    def restore_process_state(self, state: Mapping[str, Any], step: int) -> None:
        """Continue at ``step`` from ``state``, which an earlier process has saved."""
        self.global_step = step
        self.process_state.restore(state)
        if self._gate is not None:
            self._gate.begin_at(self.process_state.epochs_done)

    def finish_step(self, *, was_left: bool = False) -> None:
        """End the step of this thread, if it is in one, because its body was left or asks for a save."""
        if not self.boundary.is_mine:
            return
        feed, self._feed_of_step = self._feed_of_step, None
        if feed is not None:
            feed.consumed()
        self.global_step += 1
        self._step_is_ending()
        self.is_left = was_left
        self.boundary.leave(calls_due=not was_left)
        if self._gate is not None:
            self._gate.done(self.boundary.steps)
            if was_left:
                self._gate.end(self.boundary.steps, how=Loop.LEFT)
        # After `break` the generator is being closed: an error raised here would be lost. The session's end raises it.
        if self._gate is None and not was_left:
            self._interrupts.raise_if_held()

    # --- inside ---

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

    def _feed(self, loader: Any, epochs: int | None, resume_data: bool | str) -> Feed | None:
        if loader is not None:
            return self.process_state.feed(loader, resume_data=resume_data)
        if epochs is not None:
            raise ValueError("steps: epochs are those of a loader, and none was given")
        return None

    def _until_epoch(self, feed: Feed | None, epochs: int | None) -> int | None:
        if feed is None:
            return None
        feed.loops += 1
        if self._loops_begun is not None:
            return feed.epoch + 1
        # An iterator has one epoch, unless it begins anew by itself; then each loop over it is one epoch.
        return feed.loops if epochs is None and not feed.is_repeatable else epochs

    def _epochs(self, number: int) -> Iterator[int]:
        state = self.process_state
        while state.epochs_done < number and not self._must_end(None):
            self._loops_begun, self._epochs_wanted, self._is_cut, self._ended_by = 0, number, False, None
            state.begin_epoch()
            try:
                yield state.epochs_done
            finally:
                self._loops_begun = None
                state.leave_epoch()
            if not self._is_cut:
                self._complete_epoch(number)
            if self._ends_epochs(number):
                return
        if not self._coord.stop_requested:
            self.total_steps = self.global_step

    def _ends_epochs(self, number: int) -> bool:
        """Whether a stop or `max_steps` ends the loop over epochs after this body."""
        done = self.process_state.epochs_done
        if self._ended_by is not None and done < number:
            self._advice.on_epochs_ended(self._ended_by, done, number)
        return self._is_cut or self._ended_by is not None

    def _complete_epoch(self, number: int) -> None:
        """Complete the epoch: the changes that its body has made belong to the state of the next epoch's beginning."""
        state = self.process_state
        self._settle()
        is_last = state.epochs_done + 1 >= number or self._coord.stop_requested
        self.boundary.rest(self._turn_epoch, is_last=is_last)
        if self._gate is not None:
            self._gate.end(self.boundary.steps)
        self._raise_interrupt()

    def _turn_epoch(self) -> None:
        self.process_state.complete_epoch()
        if self._gate is not None:
            self._gate.turn(self.boundary.steps, self.process_state.epochs_done)

    def _steps(self, plan: LoopPlan) -> Iterator[Any]:
        boundary, feed, accumulate = self.boundary, plan.feed, plan.accumulate
        began_at = boundary.steps, plan.epochs_seen
        if plan.number is not None and plan.number < self.process_state.loops_done:
            # The loop had ended when the checkpoint was taken; only the rest of the epoch's body remains.
            self.process_state.resume_streams()
            if plan.is_sized and self._must_end(plan.max_steps):
                self._ended_by = plan.max_steps
            if self._gate is not None:
                self.boundary.rest(self._turn_loop)
                self._gate.end(boundary.steps)
            return
        self._advice.on_first_step(plan)
        if self._put_back is not None:
            self._undo_what_was_done_again(plan)
        self.is_update = accumulate == 1
        if feed is not None and not self._must_end(plan.max_steps):
            feed.catch_up(self._may_read_on)
        while True:
            # Called first, because it may set the session back, so that steps must be done again.
            self._settle()
            if self._must_end(plan.max_steps):
                if self._gate is not None and boundary.steps > began_at[0]:
                    self._gate.meet(boundary.steps)
                self._end_loop(plan, began_at == (boundary.steps, plan.epochs_seen))
                return
            boundary.call_due()
            if not self._begin():
                self._is_cut = True
                if self._coord.stop_reason is None and self._coord.first_error is None:
                    self._advice.on_ended_by_another(plan, self.global_step)
                boundary.rest(is_last=True)
                self._interrupts.raise_if_held()
                if plan.number is not None:
                    self._check_stop()
                return
            self._feed_of_step = feed
            turns = 0
            while True:
                try:
                    batch = self.global_step if feed is None else feed.next(plan.until_epoch)
                except StopIteration:
                    self._feed_of_step = None
                    if turns:
                        self._advice.on_leftover(turns, accumulate)
                    self._note_loop_over(plan)
                    boundary.leave(is_done=False)
                    self._end_loop(plan, began_at == (boundary.steps, plan.epochs_seen), is_over=True)
                    return
                except BaseException as error:
                    self._leave_without_batch(error, turns)
                    raise
                turns += 1
                if self._digests is not None:
                    source = "" if feed is None else shown(feed.loader)
                    self._digests.tell(self.global_step, self.process_state.epochs_done, batch, source)
                if accumulate > 1:
                    self.is_update = turns == accumulate or (feed is not None and feed.is_last_batch is True)
                try:
                    yield batch
                except GeneratorExit:
                    # The body was left: by `break`, after training with this batch, or by an error, after which nothing
                    # must be saved. The two cannot be told apart here; a next step, if there is one, proves a `break`.
                    is_mine = boundary.is_mine
                    if is_mine:
                        self._note_loop_over(plan)
                        self._left_untrained = None if self._has_trained() else self.global_step
                    self.finish_step(was_left=True)
                    if is_mine:  # Otherwise the garbage collector closes the generator, perhaps on a service's thread.
                        boundary.rest(is_last=self._coord.stop_requested)
                    raise
                if accumulate == 1 or self.is_update:
                    break
            self.finish_step()

    def _leave_without_batch(self, error: BaseException, turns: int) -> None:
        """Leave a step whose loader has failed after ``turns`` batches."""
        if turns or self._gate is not None or not isinstance(error, Exception):
            self.boundary.leave_torn()
        else:
            # Nothing was trained: the state is still that of the last boundary.
            feed, self._feed_of_step, self.failed_fetch = self._feed_of_step, None, error
            if feed is not None:
                self._advice.on_failed_fetch(feed, self.global_step)
            self.boundary.leave(is_done=False)
        self._interrupts.raise_if_held(error)

    def _undo_what_was_done_again(self, plan: LoopPlan) -> None:
        """Put the restored state back before a loop that follows loops which had ended before the restart.

        A program with an epoch loop of its own runs through these loops again, and repeats its work after each. The
        restored state already includes that work, unless it is the state at the loop's end.
        """
        feed, put_back = plan.feed, self._put_back
        if put_back is None or plan.number is not None or feed is None or self.boundary.steps:
            self._put_back = None
            return
        if self._has_begun_loop:
            with self.boundary.hold("the restored state"):
                put_back()
        self._has_begun_loop = True
        if feed.batches == 0 and feed.epoch == plan.until_epoch:
            self._put_back = None

    def _note_loop_over(self, plan: LoopPlan) -> None:
        """Record the end of the loop inside the boundary, so that a checkpoint has both its last batch and its end."""
        if plan.number is not None:
            self.process_state.loops_done = plan.number + 1

    def _note_max_steps(self, plan: LoopPlan, is_empty: bool) -> bool:
        """Note that `max_steps` has ended a loop in the body of `epochs`; return whether the loop is over.

        It is not over if its epoch has batches left: with a larger `max_steps` a next start goes on with them. Epochs
        over a loader end with `max_steps`. Where no length says what an epoch is, `max_steps` may be its end.
        """
        is_over = not is_empty if not plan.is_sized else plan.is_at_end
        self._ended_by = plan.max_steps if plan.is_sized or is_empty else None
        self._is_cut = not is_over
        return is_over

    def _turn_loop(self, plan: LoopPlan | None = None) -> None:
        """Count a loop that has ended, inside the boundary; note its end unless its last step has noted it."""
        if plan is not None:
            self._note_loop_over(plan)
        if self._gate is not None:
            self._gate.turn(self.boundary.steps)

    def _settle(self) -> None:
        if self._watch is not None and not self.boundary.is_mine:
            self._watch.settle()

    def _end_loop(self, plan: LoopPlan | None = None, is_empty: bool = False, *, is_over: bool = False) -> None:
        """End the loop: code after it, such as an evaluation, is no step that could hang or be waited for."""
        self.is_update = True
        is_stopped = self._coord.stop_requested or self.boundary.must_stop
        if not is_stopped:
            self.total_steps = self.global_step
        is_new_end = plan is not None and not is_over and not is_stopped
        if plan is not None and is_new_end and plan.number is not None:
            is_new_end = self._note_max_steps(plan, is_empty)
        self.boundary.rest(functools.partial(self._turn_loop, plan if is_new_end else None), is_last=is_stopped)
        if self._gate is not None:
            self._gate.end(self.boundary.steps)
        self._raise_interrupt()
        if plan is None:
            return
        if is_stopped and not is_over:
            self._is_cut = True
            if plan.number is not None:
                # The rest of the body is work for an epoch's end, but the epoch has not ended.
                self._check_stop()
        elif not is_stopped:
            self._advice.on_end(plan, self.global_step, is_empty=is_empty)

    def _raise_interrupt(self) -> None:
        """Raise a Ctrl-C that was held back, in the program's loop and between two loops."""
        # Until the last step is settled, another process may have begun a step that needs this one.
        if self._gate is None or self._gate.is_last:
            self._interrupts.raise_if_held()

    def _may_read_on(self) -> bool:
        return not self._must_end(None)

    def _must_end(self, max_steps: int | None) -> bool:
        # With several processes no process ends on its own: the gate closes for all of them after the same step.
        if self._gate is None and (self._is_at_end() or self._coord.stop_requested or self.boundary.must_stop):
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
        if self._is_at_end() and self._gate is None:
            return False
        if self._gate is not None and not self._gate.begin(self.boundary.steps):
            return False
        self._enter()
        return True

    def _enter(self) -> None:
        self._check_open()
        if self.boundary.is_mine:
            raise RuntimeError("a step was begun inside a step: end the outer one first, or use one loop over steps()")
        self._tell_of_untrained()
        self.boundary.enter()
        self.is_left = False
        self.process_state.begin_step()
        if self._digests is not None:
            self._digests.begin_step(self.global_step)


def _total_steps(feed: Feed | None, max_steps: int | None, epochs: int | None, accumulate: int) -> int | None:
    """The step at which a loop ends, if it is the only loop of the run; ``None`` if unknown."""
    length = None if feed is None else feed.length
    in_epochs = None if epochs is None or length is None else epochs * -(-length // accumulate)
    return min((one for one in (max_steps, in_epochs) if one is not None), default=None)


def _check_count(method: str, name: str, value: Any, *, least: int = 0) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(
            f"{method}: expected {name} to be a number or None, found {type(value).__name__}: {value!r:.80}"
        )
    if value is not None and value < least:
        raise ValueError(f"{method}: expected {name} >= {least}, found {value}")
