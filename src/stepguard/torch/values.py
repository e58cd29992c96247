"""Plain values of the program that are to be saved with the model: the best loss so far, a list of seen files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
        """Only called for what is not there."""
        raise AttributeError(f"no value {name!r}; there are: {', '.join(sorted(self.__dict__)) or 'none'}")

    def __repr__(self) -> str:
        """As it would be written."""
        return f"Values({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def state_dict(self) -> dict[str, Any]:
        """The values by name."""
        return dict(self.__dict__)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the values by those of ``state``."""
        self.__dict__.clear()
        self.__dict__.update(state)
