"""Puts saved tensors into the program's own ones, which its variables, data sets or optimizers may hold too."""

from __future__ import annotations

from typing import Any

import torch

Taken = dict[int, tuple[Any, Any]]
"""The tensors that have got other contents already, and those contents, by the identities of the tensors."""


def taken_over(held: Any, value: Any, taken: Taken) -> Any:
    """``held`` with the contents of ``value``, if both are tensors of one form; else ``value``.

    Two places of the program may share a tensor, which takes one of two contents.
    """
    if not (isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor)) or _form(held) != _form(value):
        return value
    if id(held) in taken:
        return held if taken[id(held)][1] is value else value
    # The result of a graph is needed for its gradients as it is; and a tensor of `inference_mode` cannot be changed.
    if held.grad_fn is not None or held.is_inference():
        return value
    try:
        with torch.no_grad():
            held.copy_(value)
    except RuntimeError:  # Several of its values are in one place in memory.
        return value
    taken[id(held)] = held, value
    return held


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    # Parameters are of another class than the tensors that are saved of them; DTensors and the like are not.
    kind = torch.Tensor if type(tensor) is torch.nn.Parameter else type(tensor)
    return kind, tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.is_quantized
