"""The loaders of a run, as far as they are needed: each has a place, and those that the program has dropped keep a
position and nothing else.

Loaders have no names. Outside of ``sess.epochs`` they are matched by order: a run's second loader is the second loader
of the earlier run. In the body of ``sess.epochs`` they are matched by their order in the body of that epoch, so that a
program may make a loader for each epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepguard.errors import CheckpointMismatchError
from stepguard.steps.feeds import Feed, shown
from stepguard.words import logger

_log = logger(__name__)

# How many loaders keep workers that persist from epoch to epoch while none of their epochs runs.
_RESTING = 4


@dataclass(slots=True)
class Place:
    """A loader of this run, or only the position of one: of the earlier run, or of one that the program has dropped."""

    feed: Feed | None
    position: Mapping[str, Any]
    # The epoch of `sess.epochs` in whose body the loader was last used, and its number in that body.
    used: tuple[int, int] | None = None
    # Whether it was another loader in an earlier epoch.
    is_remade: bool = False
    # Whether `resume_data=False` has begun a new epoch here.
    is_anew: bool = False
    # Whether the place belongs to a loader of this process, or has belonged to one.
    is_taken: bool = False

    def saved(self) -> dict[str, Any]:
        """The position as it is saved."""
        position = self.position if self.feed is None else self.feed.position()
        return {**position, "used": self.used, "remade": self.is_remade, "anew": self.is_anew}


class Places:
    """The places in their order. For the training thread, or a thread that holds the boundary."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._places: list[Place] = []
        # The feeds in the order of their last use.
        self._recent: list[Feed] = []
        self._next = 0
        # The epoch of `sess.epochs` whose body runs, and the loaders that it has used; `None` outside.
        self._body: int | None = None
        self._in_body: list[Place] = []

    @property
    def feeds(self) -> list[Feed]:
        """The feeds of the loaders that the program still has."""
        return [place.feed for place in self._places if place.feed is not None]

    @property
    def epoch(self) -> int:
        """The number of complete epochs over the loader used last; before its first use, that of the restored run."""
        if self._recent:
            return self._recent[-1].epoch
        return int(self._places[-1].position["epoch"]) if self._places else 0

    def number_of(self, feed: Feed) -> int:
        """The number of the place of ``feed``."""
        return next((number for number, place in enumerate(self._places) if place.feed is feed), -1)

    def restore(self, positions: Sequence[Mapping[str, Any]]) -> None:
        """Begin with the positions of an earlier run."""
        self._places = []
        for one in positions:
            used = one.get("used")
            place = Place(None, one, None if used is None else (used[0], used[1]))
            place.is_remade, place.is_anew = one.get("remade", False), one.get("anew", False)
            self._places += [place] + [Place(None, one) for _ in range(one.get("times", 1) - 1)]

    def saved(self) -> list[dict[str, Any]]:
        """The positions; a row of equal ones, of loaders that are gone, is saved once."""
        found: list[dict[str, Any]] = []
        was_gone = False
        for place in self._places:
            one = place.saved()
            is_gone = place.feed is None
            if not is_gone:
                one["processes"] = self._processes
            if is_gone and was_gone and _is_repeated(found[-1], one):
                found[-1]["times"] = found[-1].get("times", 1) + 1
            else:
                found.append({key: value for key, value in one.items() if key != "times"})
            was_gone = is_gone
        return found

    def begin_body(self, epoch: int) -> None:
        """Begin the body of an epoch of ``sess.epochs``."""
        self._body, self._in_body = epoch, []
        for feed in self.feeds:
            feed.begin_body()

    def end_body(self) -> None:
        """End the body."""
        self._body = None

    def feed(self, loader: Any, new_feed: Callable[[Any], Feed], resume_data: bool | str) -> Feed:
        """The feed of ``loader``; a new one begins at the position of the earlier run."""
        for place in self._places:
            if place.feed is not None and place.feed.is_for(loader):
                self._note_use(place)
                return place.feed
        self._drop_unused()
        feed = new_feed(loader)
        place = self._place_for(feed, resume_data)
        place.feed, place.position, place.is_taken = feed, {}, True
        self._note_use(place)
        return feed

    def _note_use(self, place: Place) -> None:
        feed = place.feed
        assert feed is not None
        if self._body is not None and not any(one is place for one in self._in_body):
            place.used = self._body, len(self._in_body)
            self._in_body.append(place)
        if not self._recent or self._recent[-1] is not feed:
            self._recent = [*(one for one in self._recent if one is not feed), feed]
            for one in self._recent[:-_RESTING]:
                one.rest()

    def _place_for(self, feed: Feed, resume_data: bool | str) -> Place:
        if self._body is None:
            number, self._next = self._next, self._next + 1
            while number < len(self._places) and self._places[number].is_taken:
                number, self._next = self._next, self._next + 1
            found = self._places[number] if number < len(self._places) else None
        else:
            found = self._place_in_body(self._body)
        if found is None:
            found = Place(None, {})
            self._places.append(found)
            if self._body is not None:
                feed.begin_at(self._body)
        elif found.is_taken or self._is_remade_each_epoch(found):
            # The program makes a loader for each epoch. Nothing goes on but the number of the epoch.
            found.is_remade = True
            feed.begin_at(self._body or 0)
        else:
            try:
                self._resume(feed, found, resume_data)
            except CheckpointMismatchError as error:
                if not self._is_of_next_epoch(found):
                    raise
                found.is_remade = True
                feed.begin_at(self._body or 0)
                _log.warning(
                    "%s: the last epoch was complete, and this one begins with another loader. A program that makes a "
                    "loader for each epoch goes on exactly; if its data has changed, the run is not the same: %s",
                    shown(feed.loader),
                    error,
                )
        return found

    def _is_of_next_epoch(self, place: Place) -> bool:
        """Whether the place had a loader of the epoch before, which is complete."""
        is_of_last = self._body is not None and place.used == (self._body - 1, len(self._in_body))
        return is_of_last and not place.position["batches"]

    def _is_remade_each_epoch(self, place: Place) -> bool:
        return place.is_remade and place.used != (self._body, len(self._in_body))

    def _place_in_body(self, body: int) -> Place | None:
        free = [place for place in self._places if place.feed is None]
        for used in ((body, len(self._in_body)), (body - 1, len(self._in_body))):
            for place in free:
                if place.used == used:
                    return place
        # A checkpoint of a run that had no `sess.epochs`, or a loader that was used before it.
        return next((place for place in free if place.used is None and not place.is_taken), None)

    def _resume(self, feed: Feed, place: Place, resume_data: bool | str) -> None:
        position = place.position
        is_done = place.is_anew and position["loader"] == feed.description()
        if resume_data is False and not is_done:
            feed.begin_at(position["epoch"])
            place.is_anew = True
            return
        if resume_data is False:
            _log.info(
                "steps: resume_data=False has begun a new epoch at an earlier start, and the run goes on in "
                "it: take it out of the program"
            )
        feed.resume(position, self._processes, is_checked=resume_data != "unchecked")

    def _drop_unused(self) -> None:
        """Drop the feeds of loaders that nobody else holds; they can never be given to ``steps`` again."""
        for place in self._places:
            feed = place.feed
            if feed is None or feed.is_held:
                continue
            place.position, place.feed = {**feed.position(), "processes": self._processes}, None
            if feed.is_over:
                # The rest of a position is for an epoch that goes on.
                kept = place.position.items()
                place.position = {key: one for key, one in kept if key == "loader" or isinstance(one, (int, str))}
            self._recent = [one for one in self._recent if one is not feed]
            feed.close()

    def close(self) -> None:
        """End the workers of all loaders."""
        for feed in self.feeds:
            feed.close()


def _is_repeated(last: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    ignored = ("times", "used", "remade", "anew")
    if one["batches"]:
        return False
    return {k: v for k, v in last.items() if k not in ignored} == {k: v for k, v in one.items() if k not in ignored}
