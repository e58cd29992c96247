"""A loop of the program's own around `step`: what the program does between two steps, and a restart does again.

A checkpoint is taken when the program comes to a step, so that its work after the step before, and before this one, is
in it. A restarted program does again what stands in front of the block: that before the loop, and that before each
step. At the block the restored state is put back. But a batch that the program has drawn or taken in front of the block
must be the same too. So a checkpoint also has the random states, and the small objects from which the program takes
something, of the end of the block before: the program begins with these, and draws and takes the same. Where it has
not, a warning says so.

Nobody tells where the loop begins. The first look at the number of the step is taken for that, as in ``while
sess.global_step < n``: what the program draws before it, it draws as in its first start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from stepguard.steps.progress import OWN, Progress
from stepguard.steps.random_streams import RandomStreams
from stepguard.words import listed, logger

_log = logger(__name__)

States = Mapping[str, Any]


class Givers(Protocol):
    """The objects of the state from which a program may take batches or numbers."""

    saves_copies: bool
    """Whether a checkpoint has the copies, so that a restart begins with them."""

    def copies_of(self, names: Sequence[str]) -> dict[str, Any]:
        """Copies of those of the named objects that are small, and no models or optimizers."""

    def digest_of(self, value: Any) -> Any:
        """What tells a copy from another."""


class OwnLoop:
    """The place of a run in its loops of the program's own. For the training thread, or one with the boundary."""

    def __init__(self, streams: RandomStreams, progress: Progress, givers: Givers) -> None:
        self._streams = streams
        self._progress = progress
        self._givers = givers
        self.is_cut: Callable[[], bool] = lambda: False
        """Whether the program was made to end at once, wherever it was."""
        self.draws_between: bool | None = None
        """Whether the program draws between two steps."""
        # Whether it draws before the loop, and whether in the loop before the first step.
        self._draws_before: bool | None = None
        self._draws_first = False
        # The states of the end of the last step, where they may be needed.
        self._after: States | None = None
        # Whether the program has come to the next step, so that its work before that is done.
        self._is_at_step = False
        # The objects from which it takes something between two steps, known after the first step; and what they were at
        # the end of the last one.
        self._taken_from: list[str] | None = None
        self._held: dict[str, Any] = {}
        # What the interrupted run has noted of this; the states with which its loop goes on, until the program is
        # there; and those since when the program has drawn for its first step.
        self._before: Mapping[str, Any] = {}
        self._in_loop: States | None = None
        self._drawn_since: States | None = None

    def saved(self) -> Mapping[str, Any]:
        """What a restart needs, as plain values and random states."""
        if not self._progress.is_there:
            return self._before
        found: dict[str, Any] = {
            "taken from": self._taken_from,
            "draws before": self._draws_before,
            "draws first": self._draws_first,
        }
        if self._is_at_step:
            found |= {"is at step": True, "gap": self._after, "held": self._held if self._givers.saves_copies else {}}
        elif self._progress.is_in_own_loop and self.is_cut():
            found["is cut"] = True
        return found

    # --- the first step after a restart ---

    def restore(self, place: Mapping[str, Any], states: States, origin: States | None) -> States:
        """Go on from the ``place`` of the interrupted run, and from ``states`` in its first step.

        ``origin`` is what a program with other loops begins with. Returns the states to begin with.
        """
        self._before = place.get("own") or {}
        self.draws_between = place.get("draws between")
        self._taken_from = self._before.get("taken from")
        self._draws_before = self._before.get("draws before")
        self._draws_first = bool(self._before.get("draws first"))
        if place.get("inside") == OWN:
            gap = self._before.get("gap") if self.goes_on_at_step else states
            if self.goes_on_at_step:
                draws = gap is not None and not self._streams.are_equal(gap, states)
            else:
                draws = bool(self.draws_between)
            self._in_loop = gap if draws and self._draws_before else None
            origin = gap if draws and not self._draws_before else place.get("origin")
        self._drawn_since = states if origin is None else origin
        return self._drawn_since

    @property
    def goes_on_at_step(self) -> bool:
        """Whether the interrupted run had done its work before the step that comes first now."""
        return bool(self._before.get("is at step"))

    @property
    def taken_from(self) -> Sequence[str]:
        """The objects of the state from which the program takes something between two steps."""
        return self._taken_from or ()

    @property
    def held_before(self) -> Mapping[str, Any]:
        """What those objects were, in the interrupted run, before it has taken something for the next step."""
        found: Mapping[str, Any] = self._before.get("held", {})
        return found

    def begin_loop(self, first: States | None) -> None:
        """Note that the program comes to a loop, perhaps of its own; ``first`` are the states of the run's beginning.

        They are ``None`` in a run that was restored.
        """
        states, self._in_loop = self._in_loop, None
        if states is not None:
            self._streams.restore(states)
        self._drawn_since = self._streams.capture()
        if first is not None:
            self._draws_before = not self._streams.are_equal(self._drawn_since, first)

    def goes_on_from(self, states: States) -> bool:
        """Whether the first step draws from ``states``; warn if the work before it is not that of the run before."""
        if self._before.get("is cut"):
            _log.warning(
                "the program was made to end at once, between two steps of its own loop: what it does there, after "
                "the one or before the other, was perhaps not done to its end"
            )
        if not self.goes_on_at_step:
            return not (self.draws_between and self._progress.is_in_own_loop)
        if not self._has_drawn_the_same(self._before.get("gap"), states):
            _log.warning(
                "the program draws random numbers between the steps of its own loop, and those that it has drawn from "
                "the beginning of that loop to its first step are not those of the interrupted run: it draws some of "
                "them in certain steps only, or after a step. Draw inside of `with sess.step():`, or use sess.epochs() "
                "and sess.steps()"
            )
        return True

    def _has_drawn_the_same(self, gap: States | None, states: States) -> bool:
        """Whether the program has drawn for this step what the interrupted run had, from ``gap`` to ``states``."""
        now, since = self._streams.capture(), self._drawn_since
        if since is not None and self._streams.are_equal(now, since):
            return True  # It has drawn nothing.
        if gap is not None and not self._streams.are_equal(gap, states):
            known = [states, *self._progress.states_on_the_way]
            return any(one is not None and self._streams.are_equal(now, one) for one in known)
        # It draws at times for several steps, as the order of an epoch; or it has come through another loop.
        return self._draws_first and not self.draws_between

    def digests(self) -> dict[str, Any]:
        """What tells, by their names, whether the objects from which the program takes something are what they were."""
        return self._digests(self._givers.copies_of(self.taken_from))

    def tell_of_taken(self, changed: Sequence[str], taken: Mapping[str, Any]) -> None:
        """Warn of ``changed`` objects from which the program has not taken the same for this step.

        They are what they were in the interrupted run now; ``taken`` has their digests before that was put back.
        """
        now, held = self.digests(), self._digests(self.held_before)
        differ = [
            name
            for name in self.taken_from
            if name in changed and (name not in held or taken.get(name) not in (held[name], now.get(name)))
        ]
        if differ:
            _log.warning(
                "the program takes something from %s between two steps of its own loop, and for this step it has not "
                "taken the same as the interrupted run. Take it inside of `with sess.step():`",
                listed(differ),
            )

    # --- steps ---

    def come_to_step(self) -> None:
        """Note that the program asks for the next step, so that its work before that is done."""
        self._is_at_step = True
        if self._taken_from is None and self._held:
            was, now = self._digests(self._held), self._digests(self._givers.copies_of(list(self._held)))
            self._taken_from = [name for name, one in was.items() if one != now.get(name)]
            kept = self._taken_from if self._givers.saves_copies else ()
            self._held = {name: self._held[name] for name in kept}

    def begin_step(self, first: States | None) -> None:
        """Begin a step; ``first`` is as in :meth:`begin_loop`, in the first step."""
        self._is_at_step = False
        if first is not None:
            self._draws_first = not self._streams.are_equal(self._streams.capture(), self._drawn_since or first)
        self._drawn_since = self._in_loop = None
        if not self.draws_between and self._after is not None:
            self.draws_between = not self._streams.are_equal(self._streams.capture(), self._after)
        self._after = None

    def end_step(self, changed_before: Sequence[str], *, is_due: bool) -> None:
        """End a step; ``is_due`` says that a save is due before the next one.

        ``changed_before`` are the objects that the first start has changed before its first step: what the program
        takes from for a step, it has changed before the first one too.
        """
        if self.draws_between is not False or is_due or self._draws_first:
            self._after = self._streams.capture()
        if self._taken_from is None:
            self._held = self._givers.copies_of(changed_before)
            self._taken_from = None if self._held else []
        elif self._taken_from and self._givers.saves_copies:
            self._held = self._givers.copies_of(self._taken_from)

    def leave(self) -> None:
        """Note that a loop over steps begins."""
        self._after = None

    def _digests(self, copies: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._givers.digest_of(one) for name, one in copies.items()}
