"""Warnings about loops that do not do what they seem to do: they train nothing, or do not resume exactly."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass
from typing import Any

from stepguard.steps.feeds import Feed, shown
from stepguard.words import logger

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """The loop that one call of `steps` describes."""

    feed: Feed | None
    max_steps: int | None
    # The loop ends when the feed has completed this number of epochs. A step has `accumulate` batches.
    until_epoch: int | None
    accumulate: int
    # The number of the loop in the body of `epochs`; ``None`` outside of `epochs`.
    number: int | None
    # The `epochs` argument of the program.
    epochs: int | None
    thread: int

    @property
    def is_sized(self) -> bool:
        """Whether the length of the loader says what an epoch is."""
        return self.feed is not None and self.feed.length is not None

    @property
    def is_at_end(self) -> bool:
        """Whether the loader has no batch left in this epoch, as far as its length says."""
        feed = self.feed
        if feed is None or feed.length is None:
            return False
        return feed.is_last_batch is True or feed.batches >= feed.length

    @property
    def epochs_seen(self) -> int:
        """The number of complete epochs over the loader."""
        return 0 if self.feed is None else self.feed.epoch


class LoopAdvice:
    """Warns of loops; each kind of warning once for each loader. For the training thread."""

    def __init__(self) -> None:
        self._told: set[tuple[str, int | None]] = set()
        # By the number of the loader, the epoch after which a run was interrupted between two loops.
        self._interrupted_after: dict[int, int] = {}

    def on_begin(self, plan: LoopPlan, *, is_first: bool, is_known: bool) -> None:
        """Warn of an epoch loop of the program's own: it is unknown which work between its loops was already done.

        ``is_first`` says that this is the first loop over this loader since the start; ``is_known`` that the program
        has gone through the loops before it again, and so through the work after each.
        """
        feed, epochs = plan.feed, plan.epochs
        if feed is None or plan.number is not None or feed.batches:
            return
        has_more = epochs is not None and 0 < feed.epoch < epochs
        if is_first:
            if has_more and not is_known:
                # A saved position at the beginning of an epoch, other than the first, is from the end of a loop. If no
                # other loop over the loader follows, it is the loop that had ended, and has been made longer.
                self._interrupted_after[feed.number] = feed.epoch
        elif has_more and feed.number in self._interrupted_after:
            self._tell(
                feed,
                "%s: the checkpoint was taken at the end of epoch %d, and it is not known whether the program had done "
                "its work at the end of that epoch. `for epoch in sess.epochs(n):` around "
                "`for batch in sess.steps(loader):` records that",
                self._interrupted_after[feed.number],
            )
        elif has_more or not feed.is_repeatable:
            self._tell(
                feed,
                "%s: the program begins another loop over the epochs of this loader. A restart may repeat or skip what "
                "the program does between its loops, such as scheduler.step(): write `for epoch in sess.epochs(n):` "
                "around `for batch in sess.steps(loader):`, without epochs=, and put that work into the outer body",
            )

    def on_first_step(self, plan: LoopPlan) -> None:
        """Warn if another thread than the one that began the loop asks for its steps."""
        if plan.thread != threading.get_ident():
            _log.warning(
                "steps: one thread began the loop, and another one asks for its steps. A step counts as done when the "
                "next one is asked for, so a prefetcher around steps() counts steps that were not trained: "
                "prefetch in the loader"
            )

    def on_resumed(self, loop: Any) -> None:
        """Warn of an iterator around ``loop``, the iterator of `steps`, that counts from 0 at each start."""
        holders = gc.get_referrers(loop)
        # A zip holds a tuple of its iterators.
        for one in [one for one in holders if type(one) is tuple]:
            holders += gc.get_referrers(one)
        around = [one for one in holders if type(one) in (enumerate, zip)]
        for one in around:
            # An enumerate is (its class, (what it counts, the next number)).
            if type(one) is enumerate and one.__reduce__()[1][1] != 0:
                continue
            _log.warning(
                "steps: this start goes on in the middle, and the program has %s around steps(), which begins anew "
                "with each start. If the training depends on what it counts, as an accumulation or a schedule does, "
                "the run is not the same: use sess.global_step, or accumulate= and sess.is_update",
                "enumerate()" if type(one) is enumerate else "zip()",
            )

    def on_end(self, plan: LoopPlan, global_step: int, *, is_empty: bool) -> None:
        """Warn of a loop that has trained less than it was asked for.

        ``is_empty`` says that it has trained no step at all.
        """
        feed = plan.feed
        if feed is not None and feed.is_exhausted and (is_empty or (plan.epochs or 0) > feed.epoch):
            self._tell(
                feed,
                "%s: %s: it is an iterator, and it is exhausted. Give steps() an object that can be iterated over "
                "again, such as the loader itself",
                "trains nothing" if is_empty else f"expected {plan.epochs} epochs, found {feed.epoch}",
            )
        elif is_empty and plan.max_steps is not None and global_step >= plan.max_steps:
            self._tell(
                feed,
                "%s: trains nothing: max_steps=%d counts the steps of the whole run, which is already at step %d",
                plan.max_steps,
                global_step,
            )
        elif is_empty and feed is not None:
            self._tell(
                feed,
                "%s: trains nothing: %d epochs over it are complete, and epochs=%s includes those before a restart. "
                "The program now repeats its work after this loop, and only its changes to the saved state are undone. "
                "For work at the end of each epoch write `for epoch in sess.epochs(n):` around "
                "`for batch in sess.steps(loader):`, without epochs=",
                feed.epoch,
                plan.until_epoch,
            )

    def on_epochs_ended(self, max_steps: int, epochs_done: int, number: int) -> None:
        """Warn of a loop over epochs that `max_steps` of a loop inside has ended."""
        _log.warning(
            "epochs: ended after %d complete epochs of %d, because the loop inside has come to max_steps=%d, which "
            "counts the steps of the whole run. For more, raise it; for epochs of a fixed number of steps, leave "
            "max_steps out and give steps() a loader of that length",
            epochs_done,
            number,
            max_steps,
        )

    def on_training_outside(self, step: int) -> None:
        """Warn of a session in which the program has trained, and none of whose steps was run."""
        _log.warning(
            "the session ends at step %d, where it began, and the program has trained in it: only the turns of "
            "`for batch in sess.steps(loader)`, and the blocks of `with sess.step()`, are steps. Nothing else is "
            "counted, or saved in its turn, and a restart does not know how far it was",
            step,
        )

    def on_own_steps_in_epoch(self, epoch: int) -> None:
        """Warn of an epoch whose body was done again without a step: `step` does not say where its loop ends."""
        _log.warning(
            "epochs: the checkpoint is of the last step in the body of epoch %d, and sess.step() does not say where a "
            "loop ends: the whole body was done again around that loop, from the state after its steps. Write the loop "
            "as `for ... in sess.steps(...)`",
            epoch,
        )

    def on_epochs_done(self, number: int, epochs_done: int) -> None:
        """Warn of a loop over epochs that can train nothing, because one before it has done as many."""
        _log.warning(
            "epochs: trains nothing: %d epochs are done, and epochs(%d) counts all those of the run. For more of them "
            "after another loop over epochs, add their number: epochs(%d)",
            epochs_done,
            number,
            epochs_done + number,
        )

    def on_ended_by_another(self, plan: LoopPlan, global_step: int) -> None:
        """Warn of a loop that stops because another process has come to its end, if this one has more to do."""
        feed = plan.feed
        if feed is None or _has_more(feed, plan.until_epoch):
            _log.warning(
                "%s: stopped after step %d, because another process has come to its end; this process was to go on, "
                "and the rest of its data is not trained. Give all processes the same number of steps",
                "steps" if feed is None else shown(feed.loader),
                global_step,
            )

    def on_leftover(self, turns: int, accumulate: int) -> None:
        """Warn of ``turns`` that are too few for a step, because the data has ended."""
        _log.warning(
            "steps: the data ended in the middle of a step: %d of accumulate=%d batches made no update, because the "
            "loader has no length and so cannot say which batch is its last. Clear their gradients before you go on",
            turns,
            accumulate,
        )

    def on_untrained(self, step: int) -> None:
        """Warn of a loop that was left in its step ``step``, counted from 0, before it trained with the batch."""
        _log.warning(
            "steps: the loop was left in step %d before an optimizer was called. The step counts as done, and its "
            "batch is not seen again: end the loop with max_steps=, or with `break` after the training with the batch. "
            "zip(sess.steps(...), range(n)) asks for one step too many",
            step,
        )

    def on_failed_fetch(self, feed: Feed, step: int) -> None:
        """Warn that the state of ``step`` is whole, but not the random streams, if the loader draws in this process."""
        if not getattr(feed.loader, "num_workers", 0):
            self._tell(
                feed,
                "%s: the loader has failed between two steps, so step %d is saved. Random numbers that it has drawn "
                "for the next batch are drawn again: if they belong to the training, a resumed run differs from "
                "here on",
                step,
            )

    def _tell(self, feed: Feed | None, message: str, *values: object) -> None:
        number = None if feed is None else feed.number
        if (message, number) not in self._told:
            self._told.add((message, number))
            _log.warning(message, "steps" if feed is None else shown(feed.loader), *values)


def _has_more(feed: Feed, until_epoch: int | None) -> bool:
    """Whether the loop has more batches to give; ``False`` if unknown."""
    if feed.is_last_batch is None:
        return False
    return not feed.is_last_batch or until_epoch is None or feed.epoch + 1 < until_epoch
