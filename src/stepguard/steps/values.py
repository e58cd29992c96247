"""Plain values that the program saves with the model, such as the best loss so far or a list of seen files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepguard.words import logger

_log = logger(__name__)


class Values:
    """Attributes that are saved and restored: numbers, strings, tensors, and lists and dictionaries of them.

    ::

        progress = Values(best_loss=float("inf"), patience=3)
        sv = Supervisor({"model": model, "progress": progress}, logdir="runs/digits")
        ...
        progress.best_loss = min(progress.best_loss, loss)
    """

    def __init__(self, **initial: Any) -> None:
        self.__dict__.update(initial)

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError. Python calls this only for a name that has no value."""
        raise AttributeError(f"no value {name!r}; there are: {', '.join(sorted(self.__dict__)) or 'none'}")

    def __repr__(self) -> str:
        """The expression that makes these values."""
        return f"Values({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def state_dict(self) -> dict[str, Any]:
        """The values by name."""
        return dict(self.__dict__)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set all values in ``state``, including names that are not set here yet.

        Values that ``state`` lacks, because the program was extended after the save, keep what the program has set. A
        warning names them.
        """
        kept = [name for name in self.__dict__ if name not in state]
        if kept:
            shown = ", ".join(f"{name}={self.__dict__[name]!r:.80}" for name in kept)
            _log.warning("values that the checkpoint does not have are kept as the program has them: %s", shown)
        self.__dict__.update(state)
