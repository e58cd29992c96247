"""The session of the loop frameworks, which the ``with`` block gets: its loops over steps and over epochs."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.steps.feeds import Feed, shown
from stepguard.steps.gate import Gate
from stepguard.steps.leaving import is_by_error
from stepguard.steps.loop_advice import LoopPlan
from stepguard.steps.process_state import ProcessState
from stepguard.steps.progress import STEPS
from stepguard.steps.step_session import StepSession


class Session(StepSession):
    """A run of a training program, from its start or restart to its stop.

    ``global_step`` is the number of steps done; inside the first step it is 0. :meth:`steps` runs many steps,
    :meth:`step` runs one. ``is_update`` is false in all turns of an accumulation but the last.
    """

    def __init__(
        self,
        coord: Coordinator,
        write_summary: Callable[[Mapping[str, Any], int], Mapping[str, float] | None],
        process_state: ProcessState,
        *,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(coord, write_summary, process_state, gate=gate)
        # The number of loops begun in the body of `epochs`; ``None`` outside.
        self._loops_begun: int | None = None
        self._epochs_wanted = 0
        # Whether a stop or `max_steps` has ended a loop before its end, so that the epoch around it is not complete;
        # and the `max_steps` that ends the loop over epochs after this body.
        self._is_cut = False
        self._ended_by: int | None = None
        # The function that puts the restored state back, until the first step; and the largest number of epochs that
        # a loop over them was asked for.
        self._put_back: Callable[[bool], None] | None = None
        self._most_epochs = 0
        # Whether the program has asked for a loop over steps or epochs, and what is called when it does.
        self._has_looped = False
        self._before_loops: Callable[[], None] = _nothing
        # What is to be told if this process trains nothing: a loop that was complete before the restart has no step.
        self._trained_nothing: Callable[[], None] | None = None
        # The iterator of the last call of `steps`.
        self._loop: Callable[[], Any] = lambda: None
        self.failed_fetch: BaseException | None = None
        """For the engine: the error by which a loader has failed to give the batch of a step that had not begun."""

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
        self._begin_loops()
        self.process_state.strangers.look()
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
        is_known = self.process_state.progress.is_there
        self._advice.on_begin(plan, is_first=feed is not None and feed.loops == 1, is_known=is_known)
        loop = self._steps(plan)
        self._loop = weakref.ref(loop)
        return loop

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
        self._begin_loops()
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

    def close(self) -> None:
        """End the session. A supervisor that still watches it saves the last step first."""
        if self.is_open and not self.boundary.steps and not self._coord.failed and not self.boundary.must_stop:
            if not self._has_looped and self._has_trained_outside():
                self._advice.on_training_outside(self.global_step)
            elif self._trained_nothing is not None:
                self._trained_nothing()
        super().close()

    # --- for the engine ---

    def put_back_with(self, put_back: Callable[[bool], None]) -> None:
        """Set the function that resets the program's objects to the state that the session was restored with.

        Its argument says whether generators among the objects are reset too: no batch was drawn yet.
        """
        self._put_back = put_back

    def call_before_loops(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the program asks for its first loop."""
        self._before_loops = callback

    # --- inside ---

    def _begin_loops(self) -> None:
        if not self._has_looped:
            self._has_looped = True
            before_loops, self._before_loops = self._before_loops, _nothing
            before_loops()

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
        state, progress = self.process_state, self.process_state.progress
        if 0 < number <= min(self._most_epochs, progress.epochs_done):
            self._advice.on_epochs_done(number, progress.epochs_done)
        self._most_epochs = max(self._most_epochs, number)
        progress.begin_epochs()
        while progress.epochs_done < number and not self._must_end(None):
            self._loops_begun, self._epochs_wanted, self._is_cut, self._ended_by = 0, number, False, None
            if state.begin_epoch():
                self._undo_what_was_done_again()
            try:
                yield progress.epochs_done
            finally:
                self._loops_begun = None
                state.leave_epoch()
            if not self._is_cut:
                self._complete_epoch(number)
            if self._ends_epochs(number):
                break
        else:
            if not self._coord.stop_requested:
                self.total_steps = self.global_step
        if not self._is_cut and not self._is_stopped and progress.end_loop(None):
            self._undo_what_was_done_again()

    def _ends_epochs(self, number: int) -> bool:
        """Whether a stop or `max_steps` ends the loop over epochs after this body."""
        done = self.process_state.progress.epochs_done
        if self._ended_by is not None and done < number:
            self._advice.on_epochs_ended(self._ended_by, done, number)
        return self._is_cut or self._ended_by is not None

    def _complete_epoch(self, number: int) -> None:
        """Complete the epoch: the changes that its body has made belong to the state of the next epoch's beginning."""
        state = self.process_state
        self._settle()
        is_last = state.progress.epochs_done + 1 >= number or self._coord.stop_requested
        self.boundary.rest(self._turn_epoch, is_last=is_last)
        if self._gate is not None:
            self._gate.end(self.boundary.steps)
        self._raise_interrupt()

    def _turn_epoch(self) -> None:
        self.process_state.leave_beginning()
        if self.process_state.progress.complete_epoch():
            self._advice.on_own_steps_in_epoch(self.process_state.progress.epochs_done)
        if self._gate is not None:
            self._gate.turn(self.boundary.steps, self.process_state.progress.epochs_done)

    def _steps(self, plan: LoopPlan) -> Iterator[Any]:
        boundary, feed, accumulate = self.boundary, plan.feed, plan.accumulate
        began_at = boundary.steps, plan.epochs_seen
        is_new = True
        progress = self.process_state.progress
        was_complete, was_between = progress.is_complete(plan.number), progress.was_between_loops
        if plan.number is not None and plan.number < progress.loops_done:
            # The loop had ended when the checkpoint was taken; only the rest of the epoch's body remains.
            self._note_loop_over(plan)
            if plan.is_sized and self._must_end(plan.max_steps):
                self._ended_by = plan.max_steps
            if self._gate is not None:
                self.boundary.rest(self._turn_loop)
                self._gate.end(boundary.steps)
            return
        is_interrupted = self.process_state.begin_loop(plan.number)
        self._advice.on_first_step(plan)
        is_inside = self.global_step > 0 if plan.number is None else feed is not None and feed.batches > 0
        if is_inside and not boundary.steps:
            self._advice.on_resumed(self._loop())
        if is_interrupted:
            self._undo_what_was_done_again()
        self.is_update = accumulate == 1
        if feed is not None and not self._must_end(plan.max_steps):
            feed.catch_up(self._may_read_on)
        while True:
            # Called first, because it may set the session back, so that steps must be done again.
            if self._watch is not None:
                self._settle()
            if self._must_end(plan.max_steps):
                if self._gate is not None and boundary.steps > began_at[0]:
                    self._gate.meet(boundary.steps)
                is_empty = began_at == (boundary.steps, plan.epochs_seen)
                self._end_loop(plan, is_empty, was_complete=was_complete, was_between=was_between)
                return
            if is_new:
                # Each further step follows the end of one, which has called what was due.
                boundary.call_due()
                is_new = False
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
                    is_empty = began_at == (boundary.steps, plan.epochs_seen)
                    self._end_loop(plan, is_empty, was_complete=was_complete, was_between=was_between, is_over=True)
                    return
                except BaseException as error:
                    self._leave_without_batch(error, turns)
                    raise
                if not turns and not boundary.steps:
                    self.process_state.strangers.leave_out_drawn()
                    self._begin_first_step(plan)
                turns += 1
                if self._digests is not None:
                    source = "" if feed is None else shown(feed.loader)
                    self._digests.tell(self.global_step, self.process_state.progress.epochs_done, batch, source)
                if accumulate > 1:
                    self.is_update = turns == accumulate or (feed is not None and feed.is_last_batch is True)
                try:
                    yield batch
                except GeneratorExit:
                    # The body was left: by `break`, after training with this batch, or by an error, after which nothing
                    # must be saved. The end of a `with` block tells which it was. Without one, how the loop's frame was
                    # left does; a next step, if there is one, proves that the program has caught the error.
                    is_mine = boundary.is_mine
                    if is_mine:
                        self._note_loop_over(plan)
                        self.is_left_by_error = not self.is_in_block and is_by_error(sys._getframe(1))
                        is_untrained = not self.is_left_by_error and not self._has_trained()
                        self._left_untrained = self.global_step if is_untrained else None
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

    def _begin_first_step(self, plan: LoopPlan) -> None:
        """Begin the first step of this process with its batch."""
        was_done = self.process_state.progress.begin_step(plan.number, STEPS)
        put_back, self._put_back = self._put_back, None
        if was_done and put_back is not None:
            put_back(False)
        self.process_state.note_first_step()

    def _undo_what_was_done_again(self) -> None:
        """Put the restored state back: the program has come to the place where it was interrupted.

        What it has done until here is in the checkpoint already.
        """
        put_back, self._put_back = self._put_back, None
        if put_back is not None:
            with contextlib.nullcontext() if self.boundary.is_mine else self.boundary.hold("the restored state"):
                put_back(True)
        self.process_state.resume_streams()

    def _begin_own_step(self) -> None:
        if self._put_back is not None or not self._has_looped:
            self._begin_loops()
            if self.process_state.own.goes_on_at_step:
                self._undo_what_was_done_again()
            self._put_back = None
        super()._begin_own_step()

    def _has_trained_outside(self) -> bool:
        """A hook for a subclass: whether the program has trained in this session, which has run no step."""
        return False

    def _note_loop_over(self, plan: LoopPlan) -> None:
        """Record the end of the loop inside the boundary, so that a checkpoint has both its last batch and its end."""
        if self.process_state.progress.end_loop(plan.number):
            self._undo_what_was_done_again()

    def _note_max_steps(self, plan: LoopPlan, is_empty: bool) -> bool:
        """Note that `max_steps` has ended a loop in the body of `epochs`; return whether the loop is over.

        It is not over if its epoch has batches left: with a larger `max_steps` a next start goes on with them. Epochs
        over a loader end with `max_steps`. Where no length says what an epoch is, `max_steps` may be its end.
        """
        is_over = not is_empty if not plan.is_sized else plan.is_at_end
        self._ended_by = plan.max_steps if plan.is_sized or is_empty else None
        self._is_cut = not is_over
        return is_over

    def _turn(self, plan: LoopPlan) -> None:
        """Note the end of a loop, and count it, inside the boundary."""
        if plan.number is not None and plan.feed is not None and plan.is_at_end:
            # Its epoch ends with the body, and the next body begins with the first batch of the next one.
            plan.feed.end_epoch()
        self._note_loop_over(plan)
        self._turn_loop()

    def _end_loop(
        self, plan: LoopPlan, is_empty: bool, *, was_complete: bool, was_between: bool, is_over: bool = False
    ) -> None:
        """End the loop; ``is_over`` says that its last step has noted its end.

        ``was_complete`` says whether it was complete before a restart, and ``was_between`` whether no loop ran then.
        """
        is_stopped = self._is_stopped
        is_new_end = not is_over and not is_stopped
        if is_new_end and plan.number is not None:
            is_new_end = self._note_max_steps(plan, is_empty and not was_complete)
        self._rest(functools.partial(self._turn, plan) if is_new_end else self._turn_loop, is_stopped=is_stopped)
        if is_stopped and not is_over:
            self._is_cut = True
            if plan.number is not None:
                # The rest of the body is work for an epoch's end, but the epoch has not ended.
                self._check_stop()
        elif not is_stopped:
            advise = functools.partial(self._advice.on_end, plan, self.global_step, is_empty=is_empty)
            if not (is_empty and was_complete) or self._is_cut:
                advise()
            elif was_between:
                self._trained_nothing = advise

    def _may_read_on(self) -> bool:
        return not self._must_end(None)


def _nothing() -> None:
    pass


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
