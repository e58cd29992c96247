"""Several loaders in one step, each with its own position in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stepguard.steps.feeds import ANYWAY, Feed


class GroupFeed(Feed):
    """A mapping or a sequence of loaders; a batch has one of each, in the same form.

    An epoch ends with the shortest of them, as with ``zip``. The others then begin a new epoch too.
    """

    def __init__(self, loader: Any, new_feed: Callable[[Any], Feed]) -> None:
        super().__init__(loader)
        members = loader.items() if isinstance(loader, Mapping) else enumerate(loader)
        self._parts: dict[Any, Feed] = {key: new_feed(one) for key, one in members}
        if not self._parts:
            raise ValueError("steps: expected at least one loader in a group of loaders, found none")
        self.is_repeatable = all(part.is_repeatable for part in self._parts.values())

    def is_for(self, loader: Any) -> bool:
        """Whether ``loader`` has the same members; a program may write the mapping anew for each loop."""
        if type(loader) is not type(self.loader) or len(loader) != len(self._parts):
            return False
        members = loader.items() if isinstance(loader, Mapping) else enumerate(loader)
        return all(key in self._parts and self._parts[key].is_for(one) for key, one in members)

    @property
    def is_held(self) -> bool:
        """Whether anybody but this feed and its mapping holds one of the loaders."""
        return any(part.is_held_besides(1) for part in self._parts.values())

    def catch_up(self, go_on: Callable[[], bool]) -> bool:
        """Let each loader go to its position."""
        return all(part.catch_up(go_on) for part in self._parts.values())

    def end_epoch(self) -> None:
        """Note that the epoch is complete, for all loaders."""
        super().end_epoch()
        for part in self._parts.values():
            if part.epoch < self.epoch:
                part.end_epoch()

    def begin_at(self, epoch: int) -> None:
        """Begin with the number of an epoch."""
        super().begin_at(epoch)
        for part in self._parts.values():
            part.begin_at(epoch)

    def begin_body(self) -> None:
        """Called when the body of an epoch begins."""
        for part in self._parts.values():
            part.begin_body()

    def consumed(self) -> None:
        """The step with the batches handed out so far is done."""
        super().consumed()
        for part in self._parts.values():
            part.consumed()

    @property
    def read_again(self) -> int:  # type: ignore[override]
        """The number of batches that were read again, of all loaders."""
        return sum(part.read_again for part in self._parts.values())

    @property
    def length(self) -> int | None:
        """The length of the shortest loader; ``None`` if one of them has none."""
        lengths = [part.length for part in self._parts.values()]
        return None if None in lengths else min(one for one in lengths if one is not None)

    @property
    def is_last_batch(self) -> bool | None:
        """Whether one of the loaders has handed out its last batch."""
        found = [part.is_last_batch for part in self._parts.values()]
        return True if True in found else None if None in found else False

    def position(self) -> dict[str, Any]:
        """The positions of the loaders, in their order."""
        return {**super().position(), "members": [part.position() for part in self._parts.values()]}

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        before = position.get("processes", 1)
        super().resume({**position, "processes": processes}, processes, is_checked=is_checked)
        members = position.get("members", ())
        if len(members) != len(self._parts):
            self._object(f"expected the positions of {len(self._parts)} loaders, found {len(members)}; {ANYWAY}")
        for part, one in zip(self._parts.values(), members, strict=False):
            part.resume({**one, "processes": before}, processes, is_checked=is_checked)
        self.batches = self._seen_before = min(part.batches for part in self._parts.values())

    def close(self) -> None:
        """End the workers of the loaders."""
        super().close()
        for part in self._parts.values():
            part.close()

    def _begin_epoch(self, skip: int) -> Iterator[Any]:  # noqa: ARG002 - each loader skips its own
        while True:
            batches = {}
            for key, part in self._parts.items():
                try:
                    batches[key] = part.next(self.epoch + 1)
                except StopIteration:
                    self.is_exhausted = self.is_exhausted or part.is_exhausted
                    return
            yield batches if isinstance(self.loader, Mapping) else type(self.loader)(batches.values())

    def description(self) -> dict[str, Any]:
        """The names of the members; each member checks its own properties."""
        return {"kind": type(self).__name__, "members": [str(key) for key in self._parts]}
