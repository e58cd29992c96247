"""The way back of a run to its newest good checkpoint: how it is taken, how often, and what is said of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from stepguard.engine import Engine, EventLog
from stepguard.errors import CheckpointCorruptError
from stepguard.options import Guarding
from stepguard.store import Checkpoint, CheckpointStore
from stepguard.words import listed


class WayBack:
    """Puts a session back to the newest checkpoint that is good and finite, ``nan_returns`` times at most.

    ``on_return`` is called at the boundary at which that was done. Threads: one at a time.
    """

    def __init__(
        self,
        options: Guarding,
        engine: Engine[Any],
        store: CheckpointStore | None,
        events: EventLog | None,
        on_return: Callable[[], None],
    ) -> None:
        self._options = options
        self._engine = engine
        self._store = store
        self._events = events
        self._on_return = on_return
        self._returns_left = options.nan_returns if options.returns else 0
        # What was seen, and where that led back to, of each return.
        self._taken: list[str] = []

    @property
    def is_open(self) -> bool:
        """Whether the run may be put back once more."""
        return self._returns_left > 0

    @property
    def is_advisable(self) -> bool:
        """Whether a run that is not to return could."""
        return not self._options.returns and self._store is not None and self._engine.can_return

    def take(self, session: Any) -> tuple[Checkpoint, int | None]:
        """Put ``session`` back, inside a boundary; the checkpoint, and the step that it holds.

        Raises:
            FileNotFoundError: there is no checkpoint.
            NoGoodCheckpointError: there are some, and none is good and finite.
        """
        engine, store = self._engine, self._store
        assert store is not None

        def attempt(checkpoint: Checkpoint) -> None:
            if checkpoint.manifest is None:
                raise CheckpointCorruptError("it has no manifest, so nobody has looked at it", path=checkpoint.path)
            engine.restore(session, checkpoint, in_run=True)
            # It may be of a run without a guard.
            names = engine.non_finite(engine.snapshot(session))
            if names:
                raise CheckpointCorruptError(f"it is not finite: {listed(names)}", path=checkpoint.path)

        checkpoint = store.newest_good(attempt=attempt, quarantine=False).checkpoint
        if checkpoint is None:
            raise FileNotFoundError(f"no checkpoint was saved in {store.root} yet; save more often")
        to_step = engine.step(session)
        if self._events is not None and to_step is not None:
            # TensorBoard drops what was left behind of the curves.
            self._events.started(to_step)
        self._on_return()
        self._returns_left -= 1
        return checkpoint, to_step

    def note(self, reason: str, checkpoint: Checkpoint, to_step: int | None) -> tuple[int, str]:
        """The way was taken for ``reason``: how many times by now, and the message that says so."""
        self._taken.append(f"{reason}: back to step {shown(to_step)}")
        number = len(self._taken)
        return number, (
            f"{reason}: the run has returned to {checkpoint.name} (step {shown(to_step)}), "
            f"{number} of at most {self._options.nan_returns} times"
        )

    def why_not(self) -> str:
        """Why the run was not put back, where that was wanted at all."""
        if not self._options.returns:
            return ""
        if self._returns_left:
            return "the training loop had ended, so the run did not return to a good checkpoint"
        returned = f"the run has returned {len(self._taken)} of at most {self._options.nan_returns} times"
        return f"{returned} ({'; '.join(self._taken)})" if self._taken else returned

    def saved_text(self) -> str:
        """What there is to go on from, as far as this process knows: one that saves nothing itself does not."""
        if self._store is None:
            return ""
        newest = None
        with contextlib.suppress(OSError):
            newest = next((one for one in self._store.candidates() if one.is_committed), None)
        if newest is None:
            return "There is no checkpoint to go on from; nothing later is saved. "
        return f"The newest checkpoint is {newest.path} (step {shown(newest.step)}); nothing later is saved. "


def shown(step: int | None) -> str:
    """A step in a message."""
    return "unknown" if step is None else str(step)
