"""The keeper: what the program says of a step goes into its checkpoint, which is taken then if it is worth keeping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepguard.engine import Engine
from stepguard.saving.checkpointer import Checkpointer
from stepguard.saving.noted import Noted
from stepguard.saving.writer import CheckpointWriter
from stepguard.store import CheckpointStore


class Keeper:
    """Keeps the checkpoints of one session that the program asks for, and those that are the best by a metric.

    Threads: those that train, outside of a step. An error of a save goes to ``on_error``, as that of any trigger.
    """

    def __init__(
        self,
        engine: Engine[Any],
        store: CheckpointStore | None,
        checkpointer: Checkpointer,
        writer: CheckpointWriter,
        noted: Noted,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._store = store
        self._checkpointer = checkpointer
        self._writer = writer
        self._noted = noted
        self._on_error = on_error

    def metrics(self, values: Mapping[str, float], step: int | None) -> None:
        """Note metrics that were measured at ``step``, the last boundary; save that step if it is one of the best."""
        self._noted.add(step, metrics=values)
        if self._checkpointer.has_saved(step):
            self._writer.mark(step)
        elif self._is_among_the_best(values, step):
            self._save("the checkpoint of one of the best steps", step)

    def save(self, name: str | None, step: int | None) -> None:
        """Save the last boundary, ``step``, now; it is kept under ``name`` until that is taken away."""
        if name is not None:
            self._noted.add(step, name=name)
        self._save("a checkpoint" if name is None else f"the checkpoint {name!r}", step)
        saved = self._checkpointer.saved_step
        if name is not None and saved != step and self._checkpointer.has_saved(saved):
            # Another thread has trained a step in between.
            self._noted.add(saved, name=name)
            self._writer.mark(saved)

    def _save(self, what: str, step: int | None) -> None:
        try:
            if self._checkpointer.save_here(what):
                # In case the step had a checkpoint already, or its write began before this was noted.
                self._writer.mark(step)
        except Exception as error:  # noqa: BLE001 - the training is well; the coordinator raises this error
            self._on_error(error)

    def _is_among_the_best(self, values: Mapping[str, float], step: int | None) -> bool:
        rule, store = self._noted.rule, self._store
        if rule is None or store is None or rule.metric not in values:
            return False
        name, value = self._engine.checkpoint_name(step), values[rule.metric]
        if not store.pins.would_be_best(name, value):
            return False
        # One that is being written may be better.
        self._writer.wait_until_idle()
        return store.pins.would_be_best(name, value)
