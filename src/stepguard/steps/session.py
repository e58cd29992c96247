"""The session of the loop frameworks, which the ``with`` block gets: it runs and counts steps, and marks their ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import ValueWatch
from stepguard.errors import StopRequested
from stepguard.steps.boundary import Boundary
from stepguard.steps.feeds import Feed
from stepguard.steps.gate import Gate, Loop
from stepguard.steps.interrupts import InterruptHold
from stepguard.steps.process_state import ProcessState


class Session:
    """A run of a training program, from its start or restart to its stop.

    ``global_step`` is the number of steps that are done: inside the first step it is 0. Steps are run by
    :meth:`steps`, or one by one by :meth:`step`.

    A framework's own session gives ``process_state`` its feeds and streams, and may note in :meth:`_step_is_ending`
    what its engine needs of a step.
    """

    def __init__(
        self,
        coord: Coordinator,
        write_summary: Callable[[Mapping[str, Any], int], None],
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
        self._interrupts = InterruptHold(self.boundary, None if gate is None else coord.request_stop)
        self._before_close: Callable[[], None] | None = None
        self._watch: ValueWatch | None = None
        self.is_open = True
        # Whether the loop's body was left in its last step: by `break`, or by an error that is not known yet.
        self.is_left = False

    def steps(
        self,
        loader: Any = None,
        *,
        max_steps: int | None = None,
        epochs: int | None = None,
        resume_data: bool = True,
    ) -> Iterator[Any]:
        """The batches of ``loader``, one for each training step; without a loader the numbers of the steps.

        The body of the loop is the step. It counts as done when the next one is asked for, and when the body is left
        by ``break``. The iterator ends when a stop was requested, at ``max_steps`` and after ``epochs``; with neither
        of the two it begins one epoch after the other.

        Args:
            loader: a loader of the framework, one with ``state_dict``, or anything to iterate over.
            max_steps: the global step to end at; steps done before a restart count.
            epochs: how many epochs over this loader to make in all; those before a restart count.
            resume_data: whether a restarted run goes on with the batch after the last that was seen. With ``False``
                it begins a new epoch, for a loader that has changed.

        Raises:
            CheckpointMismatchError: the checkpoint was saved with another loader.
            StopRequested: an earlier loop has ended for SIGTERM; ``managed_session`` ends it. Not where the program has
                asked ``should_stop()`` since, and so ends by itself.
        """
        self._check_open()
        self._check_stop()
        _check_count("max_steps", max_steps)
        _check_count("epochs", epochs)
        if loader is None:
            if epochs is not None:
                raise ValueError("steps: epochs are those of a loader, and none was given")
            feed = None
        else:
            feed = self.process_state.feed(loader, is_resumed=resume_data)
            if epochs is None and not feed.is_repeatable:
                epochs = 1
        self.total_steps = _total_steps(loader, max_steps, epochs)
        return self._steps(feed, max_steps, epochs)

    @contextmanager
    def step(self) -> Iterator[int]:
        """Run one training step, in a loop of the program's own::

            while not sv.should_stop():
                with sess.step():
                    train(next(batches))

        The block gets the number of the step. Steps of several threads run one after the other.

        Raises:
            StopRequested: the run must stop at this boundary, for example after SIGTERM; ``managed_session`` handles it.
        """
        self._settle()
        self.boundary.call_due()
        if not self._begin():
            self._interrupts.raise_if_held()
            raise StopRequested("stopped before the next step, as the other processes do")
        try:
            self.boundary.check_stop()
        except BaseException:
            self.boundary.leave(is_done=False)
            raise
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

    def summary(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Write values to the event log, as curves over the global step. Without an event log, do nothing.

        Raises:
            TypeError: a value is no number, and no tensor of one element; the message names its curve.
        """
        self._write_summary(values, self.global_step if step is None else step)

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
        self.process_state.close()
        self._interrupts.finish()

    # --- for the engine ---

    def watch(self, before_close: Callable[[], None]) -> None:
        """Call ``before_close()`` if the program itself closes the session."""
        self._before_close = before_close

    def watch_values(self, watch: ValueWatch) -> None:
        """Let ``watch`` handle non-finite numbers between two steps, and wait for that."""
        self._watch = watch

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

    def restore_process_state(self, state: Mapping[str, Any], step: int) -> None:
        """Continue at ``step`` from ``state``, which an earlier process has saved."""
        self.global_step = step
        self.process_state.restore(state)

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
                self._gate.end(self.boundary.steps, Loop.LEFT)
        # After `break` the generator is being closed, and an error raised here would be lost: the session's end raises it.
        if self._gate is None and not was_left:
            self._interrupts.raise_if_held()

    # --- inside ---

    def _step_is_ending(self) -> None:
        """A hook for a subclass. Called on the thread of the step, while the step still has the boundary."""

    def _steps(self, feed: Feed | None, max_steps: int | None, epochs: int | None) -> Iterator[Any]:
        boundary = self.boundary
        while True:
            # Called first, because it may set the session back, so that steps must be done again.
            self._settle()
            if self._must_end(max_steps):
                self._end_loop()
                return
            boundary.call_due()
            if not self._begin():
                boundary.rest()
                self._interrupts.raise_if_held()
                return
            self._feed_of_step = feed
            try:
                batch = self.global_step if feed is None else feed.next(epochs)
            except StopIteration:
                boundary.leave(is_done=False)
                self._end_loop()
                return
            except BaseException as error:
                boundary.leave_torn()
                self._interrupts.raise_if_held(error)
                raise
            try:
                yield batch
            except GeneratorExit:
                # The body was left: by `break`, and then it has trained with this batch, or by an error, and then there
                # is nothing to save. Nobody can tell here; the next step, if there is one, is the proof of a `break`.
                is_mine = boundary.is_mine
                self.finish_step(was_left=True)
                if is_mine:  # And not the garbage collector's, in the thread of a service perhaps.
                    boundary.rest()
                raise
            self.finish_step()

    def _settle(self) -> None:
        if self._watch is not None and not self.boundary.is_mine:
            self._watch.settle()

    def _end_loop(self) -> None:
        """End the loop: code after it, such as an evaluation, is no step that could hang or be waited for."""
        if self._gate is not None:
            self._gate.end(self.boundary.steps)
        if not self._coord.stop_requested:
            self.total_steps = self.global_step
        self.boundary.rest()
        self._interrupts.raise_if_held()

    def _must_end(self, max_steps: int | None) -> bool:
        # With several processes no process ends on its own: the gate closes for all of them after the same step.
        if self._gate is None and (self._coord.stop_requested or self.boundary.must_stop):
            return True
        return max_steps is not None and self.global_step >= max_steps

    def _check_stop(self) -> None:
        self.boundary.check_stop()
        if self._gate is not None and self._gate.is_last and not self._coord.main_thread_was_told():
            raise StopRequested("stopped before the next loop, as the other processes do")

    def _check_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("this session is closed: run steps inside `with sv.managed_session() as sess:`")

    def _begin(self) -> bool:
        """Enter the next step; ``False`` if no process may."""
        if self._gate is not None and not self._gate.begin(self.boundary.steps):
            return False
        self._enter()
        return True

    def _enter(self) -> None:
        self._check_open()
        if self.boundary.is_mine:
            raise RuntimeError("a step was begun inside a step: end the outer one first, or use one loop over steps()")
        self.boundary.enter()
        self.is_left = False
        self.process_state.begin_step()


def _total_steps(loader: Any, max_steps: int | None, epochs: int | None) -> int | None:
    """The step at which a loop ends, if it is the only loop of the run; ``None`` if unknown."""
    in_epochs = None
    if epochs is not None:
        # An iterable data set may have no length, or raise an error when asked for it.
        with contextlib.suppress(TypeError, NotImplementedError):
            in_epochs = epochs * len(loader)
    return min((one for one in (max_steps, in_epochs) if one is not None), default=None)


def _check_count(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"steps: expected {name} to be a number or None, found {type(value).__name__}: {value!r:.80}")
    if value is not None and value < 0:
        raise ValueError(f"steps: expected {name} >= 0, found {value}")
