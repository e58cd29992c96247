"""Whether the models of the state are in training mode: an evaluation between two loops may have left them in another.

A program that calls `eval()` there and never `train()` again trains on in that mode. Where a restart goes on in a loop,
the program has not come through that evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepguard.words import logger

_log = logger(__name__)


class Modes:
    """The modes of those of ``holders``, the objects of the state by their names, that are modules."""

    def __init__(self, holders: Mapping[str, Any]) -> None:
        self._modules = {name: one for name, one in holders.items() if isinstance(one, nn.Module)}
        self._begun = self.now()

    def now(self) -> dict[str, bool]:
        """Whether each whole module is in training mode."""
        return {name: one.training for name, one in self._modules.items()}

    def put_back(self, saved: Mapping[str, bool]) -> None:
        """Set the modes of the interrupted run, and warn where the program has set another one on its way.

        A part of a module keeps its own mode: a frozen BatchNorm is the program's to freeze again.
        """
        for name, mode in saved.items():
            module = self._modules.get(name)
            if module is None or module.training == mode:
                continue
            if module.training != self._begun[name]:
                _log.warning(
                    "%s was in %s when the run was interrupted, and the program has called %s since its start: the run "
                    "goes on in %s until the program sets the mode again",
                    name,
                    _shown(mode),
                    _shown(module.training),
                    _shown(mode),
                )
            before = module.training
            for one in module.modules():
                if one.training == before:
                    one.training = mode


def _shown(mode: bool) -> str:
    return f"{'train' if mode else 'eval'}()"
