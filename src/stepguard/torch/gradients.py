"""Gradients that were computed and not yet applied, as in a program that calls its optimizer in every fourth turn.

A checkpoint between such turns needs these gradients; without them a resumed run would make a different update. After
the optimizer's step they are of no use, and are not saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from stepguard.torch.checkpoint.sharded_tensors import is_dtensor
from stepguard.words import logger

_log = logger(__name__)


class Gradients:
    """The gradients of the parameters of one optimizer. For a thread that holds the boundary.

    ``steps_done`` returns the number of training steps done. It is called at each step of the optimizer.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, steps_done: Callable[[], int]) -> None:
        self._name = name
        self._optimizer = optimizer
        self._steps_done = steps_done
        self._stepped_in = -1
        self._mark_at_step: object = None
        self._has_warned = False
        self._hook = optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        self._stepped_in = self._steps_done()
        self._mark_at_step = self._mark()

    def _mark(self) -> object:
        """A value that changes, almost certainly, when new gradients come; those of all parameters come together."""
        first = next((gradient for _, gradient in self._present()), None)
        return None if first is None else (id(first), first._version)

    def _present(self) -> Iterator[tuple[int, torch.Tensor]]:
        number = 0
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    yield number, gradient
                number += 1

    @property
    def is_idle(self) -> bool:
        """Whether the optimizer, which was called in the step before, has no part in the running step until now."""
        return self._stepped_in == self._steps_done() - 1 and not self.unapplied()

    def unapplied(self) -> dict[int, torch.Tensor]:
        """The unapplied gradients by the numbers of their parameters; empty if the optimizer's last step came after."""
        if self._stepped_in >= self._steps_done() - 1 and self._mark() == self._mark_at_step:
            return {}
        found = dict(self._present())
        if all(_is_zero(gradient) for gradient in found.values()):
            return {}
        local = {number: gradient for number, gradient in found.items() if not is_dtensor(gradient)}
        if len(local) < len(found) and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s: a checkpoint is taken between backward() and the step of this optimizer, and gradients of sharded "
                "parameters are not saved: a restart loses them. Use sess.steps(loader, accumulate=...)",
                self._name,
            )
        return local

    def put_back(self, saved: Mapping[int, torch.Tensor]) -> None:
        """Set the gradients of the parameters to those in a checkpoint."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for number, gradient in saved.items():
            is_one = isinstance(gradient, torch.Tensor) and number < len(parameters)
            if not is_one or parameters[number].shape != gradient.shape:
                _log.warning(
                    "%s: gradient %d of the checkpoint fits no parameter, so the step that was accumulating gradients "
                    "is not the same after this restart",
                    self._name,
                    number,
                )
                continue
            parameter = parameters[number]
            parameter.grad = gradient.to(parameter.device, copy=True)

    def close(self) -> None:
        """Stop watching the optimizer."""
        self._hook.remove()


def _is_zero(gradient: torch.Tensor) -> bool:
    if gradient.layout is not torch.strided or is_dtensor(gradient):
        return False
    return not bool(gradient.any())
