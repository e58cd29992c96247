"""Where a program is among its loops, which tells a restart what the program does again before it goes on.

A program that is started again runs from its beginning. Until it comes to the place where it was interrupted, it does
again what the checkpoint has already: the work before its loops, and that between loops which had ended. The random
states of those moments are saved, so that its draws are those of the interrupted run. When it comes to the place, its
changes to the state are undone, and the streams go on from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stepguard.steps.random_streams import RandomStreams

STEPS, OWN, EPOCHS = "steps", "step", "epochs"
"""The kinds of loops: over `steps`, one of the program's own around `step`, and over `epochs`."""

_MOST_GAPS = 8


@dataclass(slots=True)
class Progress:
    """The loops of one run so far. For the training thread, or one that holds the boundary.

    Loops are counted from 0: those outside of `epochs`, of which each loop over `epochs` is one, and those in its
    running body. ``number`` is that in the body, or ``None`` outside.
    """

    streams: RandomStreams
    epochs_done: int = 0
    """The epochs of `epochs` whose bodies are complete."""
    loops_done: int = 0
    """The loops that have ended in the running body."""
    is_epoch_begun: bool = False
    """Whether a step was run in the running body."""
    # The loops outside that have ended, the kind of the one that runs, and that of the one that runs in the body.
    _ended: int = 0
    _inside: str = ""
    _inside_body: str = ""
    # The random states when the run began, when the last loop outside ended, and in the body after so many loops: at
    # its beginning, and at the ends of the first and of the last ones.
    _origin: Any = None
    _after: Any = None
    _gaps: list[Any] = field(default_factory=list)
    # The place of the interrupted run, until this one has come to it.
    _before: Mapping[str, Any] | None = None
    # Whether this process is in a loop over epochs, and the random states at the beginning of its body.
    _is_in_epochs: bool = False
    _body_states: Any = None

    def saved(self) -> dict[str, Any]:
        """The place, as plain values and random states."""
        if self._before is not None:
            return dict(self._before)
        return {
            "ended": self._ended,
            "inside": self._inside,
            "inside body": self._inside_body,
            "origin": self._origin,
            "after": self._after,
            "gaps": list(self._gaps),
        }

    def restore(self, epochs: Mapping[str, Any], place: Mapping[str, Any] | None) -> Any:
        """Go on from what was saved.

        Returns the random states of the run's beginning, if the program begins with these.
        """
        self.epochs_done, self.loops_done, self.is_epoch_begun = epochs["done"], epochs["loops"], epochs["begun"]
        if place is None:  # A checkpoint of an earlier version.
            return None
        self._before, self._origin, self._after = place, place["origin"], place["after"]
        # Between two loops outside it is not known whether the program runs through those before.
        return self._origin if place["inside"] in (STEPS, EPOCHS) else None

    @property
    def is_in_own_loop(self) -> bool:
        """Whether the last step, perhaps of the interrupted run, was one of `step`."""
        place = self.saved()
        return bool((place["inside body"] or place["inside"]) == OWN)

    @property
    def states_on_the_way(self) -> list[Any]:
        """The random states of the interrupted run from which the program may come to its first step."""
        before = self._before or {}
        return [before.get("origin"), before.get("after"), *(states for _, states in before.get("gaps", ()))]

    @property
    def is_there(self) -> bool:
        """Whether the program has come to where it was interrupted, or was never."""
        return self._before is None

    @property
    def was_between_loops(self) -> bool:
        """Whether the run was interrupted between two loops over steps, or after its last one."""
        before = self._before
        return before is not None and not before["inside body"] and before["inside"] in ("", EPOCHS)

    def is_complete(self, number: int | None) -> bool:
        """Whether a loop that trains nothing had trained before the restart."""
        before = self._before
        if before is None:
            return False
        if number is None:
            return self._ended < before["ended"] or bool(before["inside"])
        return number <= self.loops_done

    def begin_run(self) -> None:
        """Note that the run begins here, if it was not restored."""
        if self._origin is None:
            self._origin = self.streams.capture()

    def begin_loop(self, number: int | None, kind: str) -> bool:
        """Begin a loop. Returns whether it is the one that was interrupted."""
        if number is None and kind == STEPS:
            self._leave_epochs()
        before = self._before
        if before is None:
            self._note_begun(kind)
            return False
        if number is not None:
            is_it = kind == before["inside body"] and number == self.loops_done and before["inside"] == EPOCHS
        else:
            is_it = kind == before["inside"] == STEPS and self._ended == before["ended"]
        if is_it:
            self._arrive()
            self._note_begun(kind)
        return is_it

    def begin_step(self, number: int | None, kind: str) -> bool:
        """Begin the first step after a restart, in a loop that was not known as the interrupted one.

        Returns whether what the program has done until here was done before: not if it follows a loop that had ended.
        """
        before = self._before
        if before is None:
            return False
        was_done = number is None and kind == STEPS and before["inside"] == STEPS
        self._arrive()
        self._note_begun(kind)
        return was_done

    def end_loop(self, number: int | None) -> bool:
        """End a loop. Returns whether it was the last that had ended when the run was interrupted."""
        before, is_of_epochs = self._before, number is None and self._is_in_epochs
        if number is None:
            self._ended, self._is_in_epochs = self._ended + 1, False
        if before is None:
            self._note_ended(number)
            return False
        if number is None:
            is_last = not before["inside"] and self._ended == before["ended"]
            # A checkpoint after the last body does not know yet that it is the last.
            was_between = is_of_epochs and before["inside"] == EPOCHS and not self.is_epoch_begun
            is_last = is_last or (was_between and self._ended == before["ended"] + 1)
        else:
            is_of_body = before["inside"] == EPOCHS and not before["inside body"]
            is_last = is_of_body and number + 1 == self.loops_done
        if is_last:
            self._arrive()
            self._inside = EPOCHS if number is not None else ""
        elif number is not None:
            self._go_to(before["gaps"], number + 1)
        elif self._ended == before["ended"] and self._after is not None:
            self.streams.restore(self._after)
        return is_last

    def begin_epochs(self) -> None:
        """Begin a loop over epochs, perhaps one that has no body left."""
        self._leave_epochs()
        self._is_in_epochs = True

    def begin_body(self) -> bool:
        """Begin the body of an epoch. Returns whether the run was interrupted between two bodies."""
        before = self._before
        is_begun = self.is_epoch_begun or (before is not None and before.get("own", {}).get("is at step"))
        if before is not None and is_begun and before["inside"] == EPOCHS:
            self._go_to(before["gaps"], 0)
            return False
        if before is not None and before["inside"] != EPOCHS:
            # The body may be left at once, by `break`: its first step will show.
            self._body_states = self.streams.capture()
            return False
        self._arrive()
        self._inside, self._inside_body, self.loops_done = EPOCHS, "", 0
        self._gaps = [(0, self.streams.capture())]
        return before is not None

    def complete_epoch(self) -> bool:
        """Note that the body is done.

        Returns whether it is unknown what of it was done before: it had a loop of the program's own, which has no step
        left.
        """
        is_unknown = self._before is not None and self._before["inside body"] == OWN
        self._arrive()
        self.epochs_done += 1
        self.loops_done, self.is_epoch_begun, self._inside_body, self._gaps = 0, False, "", []
        return is_unknown

    def _arrive(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            self._inside, self._inside_body = before["inside"], before["inside body"]
            self._after, self._gaps = before["after"], list(before["gaps"])
            if self._is_in_epochs and self._inside != EPOCHS:
                self._inside, self._inside_body, self.loops_done = EPOCHS, "", 0
                self._gaps = [(0, self._body_states)]

    def _leave_epochs(self) -> None:
        """Note that a loop over epochs was left by ``break``, if one was."""
        if self._is_in_epochs:
            self._is_in_epochs = False
            self._ended += 1
            if self._before is None:
                self._inside, self._inside_body, self._gaps = "", "", []

    def _note_begun(self, kind: str) -> None:
        self.is_epoch_begun = True
        if self._inside == EPOCHS:
            self._inside_body = kind
        else:
            self._inside = kind

    def _note_ended(self, number: int | None) -> None:
        if number is None:
            self._inside, self._after = "", self.streams.capture()
        else:
            self.loops_done, self._inside_body = number + 1, ""
            self._gaps.append((number + 1, self.streams.capture()))
            if len(self._gaps) > _MOST_GAPS:
                del self._gaps[_MOST_GAPS // 2]

    def _go_to(self, gaps: Iterable[Any], number: int) -> None:
        for one, states in gaps:
            if one == number:
                self.streams.restore(states)
