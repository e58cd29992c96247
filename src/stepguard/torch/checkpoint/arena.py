"""Host memory that is made and touched before it is needed.

The system hands out memory page by page, when a page is first written: a first copy of a large state takes several
times as long as a later one. The arena pays for that before the first step. Its size is an estimate, because most
optimizers make their state only in their first step.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch

# What the vector instructions of all processors like.
_ALIGNMENT = 64
# Room for what else is new at the first snapshots, such as random states and positions in the data.
_SPARE_BYTES = 1 << 20


class Arena:
    """Memory for buffers in host memory, each with a storage of its own. An exhausted arena gives ordinary memory."""

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes + _SPARE_BYTES if nbytes else 0
        self._memory = mmap.mmap(-1, self._left) if self._left else None
        if self._memory is not None:
            torch.frombuffer(self._memory, dtype=torch.uint8).zero_()

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A buffer for a copy of ``tensor``: on the CPU, with its shape, type and strides."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._memory is None or not nbytes or nbytes > self._left:
            return torch.empty_like(tensor, device="cpu")
        # A slice of the mapping becomes a storage of this size: `torch.save` writes whole storages.
        offset = len(self._memory) - self._left
        self._left = max(0, self._left - nbytes - -nbytes % _ALIGNMENT)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=offset).view(tensor.dtype)
        form = torch.empty_like(tensor, device="meta")
        return flat.as_strided(form.shape, form.stride())


def coming_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """An estimate of the host memory, in bytes, for the state that ``optimizers`` will have after their first step."""
    return sum(
        _tensors_of(group) * (parameter.numel() * parameter.element_size() + _ALIGNMENT)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and not parameter.is_cuda and parameter not in optimizer.state
    )


def _tensors_of(group: dict[str, object]) -> int:
    """How many tensors of the size of a parameter an optimizer with these options keeps for it."""
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    return bool(group.get("momentum", 1)) + ("alpha" in group)  # Of those with alpha, RMSprop is the common one.
