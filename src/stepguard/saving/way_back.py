"""The way back of a run to its newest good checkpoint: taking it, counting the returns, and describing them."""

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

    ``on_return`` is called with the step after each restore, inside the same boundary. Threads: one at a time.
    """

    def __init__(
        self,
        options: Guarding,
        engine: Engine[Any],
        store: CheckpointStore | None,
        events: EventLog | None,
        on_return: Callable[[int | None], None],
    ) -> None:
        self._options = options
        self._engine = engine
        self._store = store
        self._events = events
        self._on_return = on_return
        self._returns_left = options.nan_returns if options.returns else 0
        # For each return: the observation, and the step that it led back to.
        self._taken: list[str] = []

    @property
    def is_open(self) -> bool:
        """Whether the run may return once more."""
        return self._returns_left > 0

    @property
    def is_advisable(self) -> bool:
        """Whether the run could return, although its options do not ask for that."""
        return not self._options.returns and self._store is not None and self._engine.can_return

    def take(self, session: Any) -> tuple[Checkpoint, int | None]:
        """Put ``session`` back, inside a boundary. Returns the restored checkpoint and its step.

        Raises:
            FileNotFoundError: no checkpoint exists.
            NoGoodCheckpointError: checkpoints exist, and none is both good and finite.
        """
        engine, store = self._engine, self._store
        assert store is not None

        def attempt(checkpoint: Checkpoint) -> None:
            if checkpoint.manifest is None:
                raise CheckpointCorruptError("it has no manifest, so nobody has looked at it", path=checkpoint.path)
            engine.restore(session, checkpoint, in_run=True)
            # A run without a guard may have saved it.
            names = engine.non_finite(engine.snapshot(session))
            if names:
                raise CheckpointCorruptError(f"it is not finite: {listed(names)}", path=checkpoint.path)

        checkpoint = store.newest_good(attempt=attempt, quarantine=False).checkpoint
        if checkpoint is None:
            raise FileNotFoundError(f"no checkpoint was saved in {store.root} yet; save more often")
        to_step = engine.step(session)
        if self._events is not None and to_step is not None:
            # After this record, TensorBoard drops the points of the steps that are done again.
            self._events.started(to_step)
        self._on_return(to_step)
        self._returns_left -= 1
        return checkpoint, to_step

    def note(self, reason: str, checkpoint: Checkpoint, to_step: int | None) -> tuple[int, str]:
        """Count a return for ``reason``. Returns the number of returns so far, and a message about this one."""
        self._taken.append(f"{reason}: back to step {shown(to_step)}")
        number = len(self._taken)
        return number, (
            f"{reason}: the run has returned to {checkpoint.name} (step {shown(to_step)}), "
            f"{number} of at most {self._options.nan_returns} times"
        )

    def why_not(self) -> str:
        """Why the run did not return; empty if its options do not ask for returns."""
        if not self._options.returns:
            return ""
        if self._returns_left:
            return "the training loop had ended, so the run did not return to a good checkpoint"
        returned = f"the run has returned {len(self._taken)} of at most {self._options.nan_returns} times"
        return f"{returned} ({'; '.join(self._taken)})" if self._taken else returned

    def saved_text(self) -> str:
        """A sentence that names the newest checkpoint; empty in a process without a store, which cannot know."""
        if self._store is None:
            return ""
        newest = None
        with contextlib.suppress(OSError):
            newest = next((one for one in self._store.candidates() if one.is_committed), None)
        if newest is None:
            return "There is no checkpoint to go on from; nothing later is saved. "
        return f"The newest checkpoint is {newest.path} (step {shown(newest.step)}); nothing later is saved. "


def shown(step: int | None) -> str:
    """A step as text in a message."""
    return "unknown" if step is None else str(step)
