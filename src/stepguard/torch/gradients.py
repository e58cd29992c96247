"""Gradients that the next step needs, without which a resumed run would make a different update.

Those of a program that calls its optimizer in every fourth turn are not yet applied between its turns. After the
optimizer's step gradients are of no use, and are not saved, unless the program keeps them: it never clears them, or
multiplies them to have a momentum, or sets them to zero. Then the next ones are added to them, and an optimizer changes
a parameter whose gradient is zero, as by its weight decay. It leaves alone one without a gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from stepguard.torch.checkpoint.sharded_tensors import is_dtensor
from stepguard.words import logger

_log = logger(__name__)

Needed = Mapping[int, torch.Tensor | None]
"""The gradients that a checkpoint needs, by the numbers of their parameters; ``None`` for each if all are zero."""


class Gradients:
    """The gradients of the parameters of one optimizer. For a thread that holds the boundary.

    ``steps_done`` returns the number of training steps done. It is called at each step of the optimizer.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, steps_done: Callable[[], int]) -> None:
        self._name = name
        # Weak: one that is not in the state may go while the run goes on.
        self._optimizer = weakref.ref(optimizer)
        self._steps_done = steps_done
        self._stepped_in = -1
        # The first parameter with a gradient at the optimizer's last step, the gradient, and how often it had been
        # changed.
        self._parameter_at_step: weakref.ref[torch.Tensor] | None = None
        self._at_step: weakref.ref[torch.Tensor] | None = None
        self._version_at_step = 0
        # Whether a gradient outlives the step after that in which it was applied: unknown before the second step.
        self._is_kept: bool | None = None
        self._has_warned = False
        self._hook = optimizer.register_step_post_hook(self.note_step)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters of the optimizer."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]

    def note_step(self, *_: Any) -> None:
        """Note a step of the optimizer."""
        is_first, self._stepped_in = self._stepped_in < 0, self._steps_done()
        if not is_first:
            # Others, which had none then, may have gradients now.
            parameter = None if self._parameter_at_step is None else self._parameter_at_step()
            gradient = None if parameter is None else parameter.grad
            self._is_kept = self._is_kept or (gradient is not None and self._is_at_step(gradient))
        first = next(self._present(), None)
        self._parameter_at_step = None if first is None else weakref.ref(first[1])
        self._at_step = None if first is None else weakref.ref(first[2])
        self._version_at_step = 0 if first is None else first[2]._version

    def _first(self) -> torch.Tensor | None:
        return next((gradient for _, _, gradient in self._present()), None)

    def _is_at_step(self, gradient: torch.Tensor) -> bool:
        """Whether this is the tensor of the optimizer's last step; a cleared one is followed by another tensor."""
        return self._at_step is not None and self._at_step() is gradient

    def _are_applied(self) -> bool:
        """Whether no gradients came after the optimizer's last step; those of all parameters come together."""
        gradient = self._first()
        if gradient is None:
            return self._at_step is None
        return self._is_at_step(gradient) and gradient._version == self._version_at_step

    def _present(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        number = 0
        optimizer = self._optimizer()
        for group in () if optimizer is None else optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    yield number, parameter, gradient
                number += 1

    @property
    def is_idle(self) -> bool:
        """Whether the optimizer, which was called in the step before, has no part in the running step until now."""
        return self._stepped_in == self._steps_done() - 1 and not self.unapplied()

    def needed(self) -> Needed:
        """The gradients that a checkpoint needs."""
        unapplied = self.unapplied()
        if unapplied or self._is_kept is False:
            return unapplied
        return _without_zeros({number: one for number, _, one in self._present() if not is_dtensor(one)})

    @property
    def has_stepped(self) -> bool:
        """Whether the optimizer was called."""
        return self._stepped_in >= 0

    def unapplied(self) -> dict[int, torch.Tensor]:
        """The unapplied gradients by the numbers of their parameters; empty if the optimizer's last step came after."""
        if self._stepped_in >= self._steps_done() - 1 and self._are_applied():
            return {}
        found = self._not_zero()
        local = {number: gradient for number, gradient in found.items() if not is_dtensor(gradient)}
        if len(local) < len(found) and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s: a checkpoint is taken between backward() and the step of this optimizer, and gradients of sharded "
                "parameters are not saved: a restart loses them. Use sess.steps(loader, accumulate=...)",
                self._name,
            )
        return local

    def _not_zero(self) -> dict[int, torch.Tensor]:
        """The gradients, unless all are zero."""
        found = {number: gradient for number, _, gradient in self._present()}
        return {} if all(map(_is_zero, found.values())) else found

    def put_back(self, saved: Needed) -> None:
        """Set the gradients of the parameters to those in a checkpoint."""
        put_back(self._name, self.parameters, saved)

    def close(self) -> None:
        """Stop watching the optimizer."""
        self._hook.remove()


def needed_besides(
    modules: Mapping[str, torch.nn.Module], watched: Collection[Gradients], others: Collection[Gradients]
) -> dict[str, Needed]:
    """The gradients in ``modules`` of which none of the ``watched`` knows, by the names of the modules and by number.

    They are of ``others``, the optimizers that are not in the state; or of a program that has no optimizer, and applies
    its gradients itself.
    """
    known = {id(parameter) for one in watched for parameter in one.parameters}
    theirs = {id(parameter) for one in others for parameter in one.parameters}
    known |= {id(parameter) for one in others if not one.needed() for parameter in one.parameters}
    needed: dict[str, Needed] = {}
    for name, module in modules.items():
        found = {
            number: parameter.grad
            for number, parameter in enumerate(module.parameters())
            if parameter.grad is not None
            and id(parameter) not in known
            and (not watched or id(parameter) in theirs)
            and not is_dtensor(parameter.grad)
        }
        if found:
            needed[name] = _without_zeros(found)
    return needed


def put_back(name: str, parameters: Sequence[torch.Tensor], saved: Needed) -> None:
    """Set the gradients of ``parameters``, those of the object ``name``, to those in a checkpoint."""
    for number, gradient in saved.items():
        is_one = number < len(parameters) and isinstance(gradient, (torch.Tensor, type(None)))
        if not is_one or (gradient is not None and parameters[number].shape != gradient.shape):
            _log.warning(
                "%s: gradient %d of the checkpoint fits no parameter, so the step that was accumulating gradients "
                "is not the same after this restart",
                name,
                number,
            )
            continue
        parameter = parameters[number]
        if gradient is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad = gradient.to(parameter.device, copy=True)


def _without_zeros(found: Mapping[int, torch.Tensor]) -> Needed:
    return dict.fromkeys(found) if all(map(_is_zero, found.values())) else found


def _is_zero(gradient: torch.Tensor) -> bool:
    if gradient.layout is not torch.strided or is_dtensor(gradient):
        return False
    return not bool(gradient.any())
