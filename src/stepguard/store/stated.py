"""What the chief says in the state file of its logdir: see `stepguard.store.statefile` for the file itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

from stepguard.store import statefile
from stepguard.store.layout import Layout
from stepguard.words import logger

_log = logger(__name__)


class Stated:
    """The state file of one store. One thread at a time, of the chief.

    Paths in it are relative with ``relative_paths``. ``opened_at`` is the Unix time at which the run began.
    """

    def __init__(self, layout: Layout, *, relative_paths: bool, opened_at: float) -> None:
        self._layout = layout
        self._relative_paths = relative_paths
        self._opened_at = opened_at
        self._has_warned = False
        self.newest: str | None = None
        """The newest checkpoint that this run has written into the file."""

    def write(self, newest: str, kept: Sequence[str], last_preserved: float | None) -> None:
        """Replace the file. ``kept`` are the names that it lists, oldest first. Raises OSError."""
        stated, *names = self._layout.stated([newest, *kept])
        root, is_relative = self._layout.root, self._relative_paths
        statefile.write(root, stated, names, last_preserved=last_preserved, relative_paths=is_relative)
        self.newest = newest

    def write_after_commit(self, newest: str, kept: Sequence[str], last_preserved: float | None) -> None:
        """Replace the file as `write` does. If that fails, a warning says so, once until it works again."""
        try:
            self.write(newest, kept, last_preserved)
        except OSError as error:
            if not self._has_warned:
                _log.warning(
                    "%s: could not be written (%s): TensorFlow's own tools find %s only once it can be; "
                    "a restart finds it without",
                    self._layout.root / statefile.FILE_NAME,
                    error,
                    newest,
                )
            self._has_warned = True
        else:
            self._has_warned = False

    def point_to(self, newest: str, kept: Sequence[str]) -> None:
        """Name ``newest`` in the file, which lists ``kept`` beside it. If that fails, a warning says so."""
        state = statefile.read(self._layout.root)
        try:
            self.write(newest, [*kept, newest], None if state is None else state.last_preserved)
        except OSError as error:
            _log.warning("%s: could not be written: %s", self._layout.root / statefile.FILE_NAME, error)

    def anchor(self) -> float:
        """Return the time from which the hours of "keep one every n hours" are counted."""
        state = statefile.read(self._layout.root)
        stored = state.last_preserved if state is not None else None
        # A time in the future means that the clock was set back. Waiting for it could keep no checkpoint for years.
        return stored if stored is not None and stored <= self._opened_at else self._opened_at


def insert(layout: Layout, name: str, pinned: Collection[str]) -> None:
    """List ``name`` in the state file, in its place by step, unless it is pinned. See `CheckpointStore.count_again`."""
    state = statefile.read(layout.root)
    if state is None or name in state.names or name in pinned:
        return
    step = layout.step_of(name)
    steps = [layout.step_of(one) if layout.is_name(one) else None for one in state.names]
    place = next((n for n, one in enumerate(steps) if (one or 0) > (step or 0)), len(steps))
    _rewrite(layout, state, state.newest, [*state.names[:place], name, *state.names[place:]])


def drop(layout: Layout, names: AbstractSet[str], newest_good: str) -> None:
    """Take ``names`` off the state file, which then names ``newest_good`` if it named one of them as the newest."""
    state = statefile.read(layout.root)
    if state is None or not names & {state.newest, *state.names}:
        return
    newest = newest_good if state.newest in names else state.newest
    kept = [one for one in state.names if one not in names]
    _rewrite(layout, state, newest, kept if newest in kept else [*kept, newest])


def _rewrite(layout: Layout, state: statefile.CheckpointState, newest: str, names: Sequence[str]) -> None:
    """Write other names with the rest as it is, for a process that trains nothing."""
    stated, *listed = layout.stated([newest, *names])
    statefile.write(
        layout.root.absolute(),
        stated,
        listed,
        last_preserved=state.last_preserved,
        relative_paths=not state.path.is_absolute(),
    )
