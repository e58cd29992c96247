"""What a program saves: objects by name, whether each can be saved, and whether a saved state fits it."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from stepguard.torch.checkpoint.files import is_process
from stepguard.torch.checkpoint.sharded_tensors import Layouts, Shard, check_shardable, is_dtensor, is_sharded, shard_of

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

# What PyTorch's own optimizers keep in the shape of the parameter. Others may use the same names for what is smaller.
_OF_PARAMETER_SHAPE = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
    "prev",
    "step_size",
    "ax",
}

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Component:
    """One named object of the program's state. Everything here is for a thread that holds the boundary."""

    def __init__(self, name: str, holder: Any) -> None:
        self.name = name
        self._holder = _unwrapped(holder)

    def state(self) -> Any:
        """The state as it is now: tensors that training goes on changing, in dictionaries and lists."""
        holder = self._holder
        if isinstance(holder, torch.Generator):
            return {"state": holder.get_state()}
        if isinstance(holder, random.Random):
            return {"state": holder.getstate()}
        if _is_numpy_generator(holder):
            return _without_arrays(holder.bit_generator.state)
        return holder.state_dict()

    def load(self, state: Any) -> None:
        """Put a saved state in place. Its tensors may be those of a mapped file: none of them is kept."""
        holder = self._holder
        if isinstance(holder, nn.Module):
            _make_room(holder, state)
            # It copies into the tensors that it has, or nearly always does.
            holder.load_state_dict(state)
            if not _shares_memory(holder.state_dict(), state):
                return
        # Of sparse tensors deepcopy knows only some.
        sparse = {id(part): part.clone() for _, part in leaves("", state) if _is_sparse(part)}
        state = copy.deepcopy(state, sparse)
        if isinstance(holder, torch.Generator):
            holder.set_state(state["state"])
        elif isinstance(holder, random.Random):
            holder.setstate(state["state"])
        elif _is_numpy_generator(holder):
            holder.bit_generator.state = _with_arrays(state, holder.bit_generator.state)
        else:
            holder.load_state_dict(state)

    def layouts(self) -> Layouts:
        """How its tensors are spread over the processes."""
        groups = self._holder.param_groups if isinstance(self._holder, torch.optim.Optimizer) else ()
        return Layouts(self.name, self.state(), [parameter for group in groups for parameter in group["params"]])

    def put_back(self, state: Any) -> None:
        """Put a saved state in place, in the middle of a run: streams of random numbers go on, gradients are gone."""
        holder = self._holder
        if isinstance(holder, (torch.Generator, random.Random)) or _is_numpy_generator(holder):
            return
        self.load(state)
        if isinstance(holder, nn.Module):
            # What was accumulated for the step that is not done now may be what is wrong.
            holder.zero_grad(set_to_none=True)

    def misfit(self, saved: Any) -> Misfit:
        """What keeps ``saved`` from being loaded; nothing is changed."""
        found = Misfit()
        live = self.state()
        if not self._is_of_this_kind(live, saved):
            found.reshaped[self.name] = (f"the state of a {type(self._holder).__name__}", _described(saved))
        elif isinstance(self._holder, torch.optim.Optimizer):
            _compare_groups(self.name, live, saved, found)
            if not found and type(self._holder).step.__module__.startswith("torch.optim."):
                _compare_parameters(self.name, self._holder, saved, found)
        elif isinstance(live, Mapping) and isinstance(saved, Mapping):
            # An object of another kind may itself accept a state of an older version, with fewer keys or more.
            if isinstance(self._holder, nn.Module):
                found.missing += [f"{self.name}.{key}" for key in live if key not in saved]
                found.unexpected += [f"{self.name}.{key}" for key in saved if key not in live]
            _compare_shapes(self.name, live, saved, found)
        return found

    def _is_of_this_kind(self, live: Any, saved: Any) -> bool:
        """Whether ``saved`` may be the state of an object like this one, as far as its kind has a form of its own."""
        holder = self._holder
        if isinstance(live, Mapping) != isinstance(saved, Mapping):
            return False
        if isinstance(holder, torch.Generator):
            return set(saved) == {"state"} and isinstance(saved["state"], torch.Tensor)
        if isinstance(holder, random.Random):
            return set(saved) == {"state"} and isinstance(saved["state"], tuple)
        if _is_numpy_generator(holder):
            return bool(saved.get("bit_generator") == live["bit_generator"])
        if isinstance(holder, torch.optim.Optimizer):
            return {"state", "param_groups"} <= set(saved)
        return True


@dataclass(slots=True)
class Misfit:
    """What the model has and the checkpoint lacks, the reverse, and what has another shape, or kind, in each."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.missing or self.unexpected or self.reshaped)

    def add(self, other: Misfit) -> None:
        """Take over what another one has found."""
        self.missing += other.missing
        self.unexpected += other.unexpected
        self.reshaped.update(other.reshaped)

    def __str__(self) -> str:
        """The differences, the first few of each kind by name."""
        parts = []
        if self.missing:
            parts.append(f"the program has {_some(self.missing)}, and the checkpoint does not")
        if self.unexpected:
            parts.append(f"the checkpoint holds {_some(self.unexpected)}, and the program does not")
        if self.reshaped:
            pairs = [f"{name} (expected {has}, found {held})" for name, (has, held) in self.reshaped.items()]
            parts.append(f"of another shape or kind: {_some(pairs)}")
        return "; ".join(parts)


def components(state: Mapping[Any, Any]) -> list[Component]:
    """The named objects of the program, each of which has been asked for its state once.

    Raises:
        TypeError, ValueError: one of them cannot be saved; the message names it, and the place in it.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f'state: expected a dictionary such as {{"model": model, "optimizer": optimizer}}, found '
            f"{type(state).__name__}"
        )
    if not state:
        raise ValueError("state: expected at least one object to save, found an empty dictionary")
    found = []
    for name, holder in state.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or is_process(name):
            raise ValueError(
                f"state: expected names of letters, digits, '_', '-' and '.' (they become file names), and none like "
                f"'process-0', found {name!r}"
            )
        if not _is_saveable(holder):
            raise TypeError(
                f"state[{name!r}]: expected an object with state_dict and load_state_dict, found "
                f"{type(holder).__name__}; plain values go in stepguard.torch.Values(...)"
            )
        if _gathers_state(holder):
            raise TypeError(
                f"state[{name!r}]: this model was wrapped by FullyShardedDataParallel, whose state_dict is a "
                f"collective operation, and would come between those of the training; use "
                f"torch.distributed.fsdp.fully_shard"
            )
        component = Component(name, holder)
        live = component.state()
        check_saveable(name, live)
        if is_sharded(live):
            check_shardable(name, live)
        found.append(component)
    return found


def check_saveable(path: str, value: Any) -> None:
    """Look at every part of a state.

    Raises:
        TypeError: a part is of a type that only code from the file could bring back; the message names it.
    """
    for place, part in leaves(path, value):
        if isinstance(part, torch.Tensor):
            _check_tensor(place, part)
        elif not (type(part) in _PLAIN or _is_numpy_scalar(part)):
            hint = "; torch.from_numpy(array) can be saved" if type(part).__name__ == "ndarray" else ""
            raise TypeError(
                f"{place}: expected a tensor, a number, a string, or a dictionary, list or tuple of them, found "
                f"{type(part).__module__}.{type(part).__qualname__}, which could be restored only by running code "
                f"from the file{hint}"
            )


def _check_tensor(place: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise TypeError(
            f"{place}: this parameter of a lazy module has no shape yet, and no values to save; run one batch through "
            f"the model before the Supervisor is made (and before the optimizer is)"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{place}: expected a tensor of one shape, found a nested one, which cannot be saved exactly; keep its "
            f"parts as a list of tensors, tensor.unbind()"
        )
    if tensor.is_meta:
        raise TypeError(f"{place}: this tensor is on the meta device: it has a shape and no values to save")
    if tensor.layout is not torch.strided and not _is_sparse(tensor):
        raise TypeError(
            f"{place}: expected a dense or a sparse tensor, found one of the layout {tensor.layout}, which cannot be "
            f"saved exactly; tensor.to_dense() can"
        )


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a nested state that are no containers, each with its place."""
    # MultiStepLR counts its milestones; PyTorch reads a Counter without running code since 2.4.
    if type(value) in (dict, OrderedDict, Counter):
        for key, part in value.items():
            if type(key) not in _PLAIN and type(key) is not tuple:
                yield f"{path}.{key!r} (the key)", key
            yield from leaves(f"{path}.{key}", part)
    elif type(value) in (list, tuple):
        for index, part in enumerate(value):
            yield from leaves(f"{path}[{index}]", part)
    else:
        yield path, value


def non_finite(path: str, state: Any) -> list[str]:
    """The places of what is NaN in a nested state in host memory, and of tensors that hold an infinity.

    A plain number may be infinite: that is how schedulers, and the programs, write "none so far".
    """
    found = []
    for place, part in leaves(path, state):
        if isinstance(part, Shard):
            part = part.local
        if isinstance(part, torch.Tensor):
            if not _is_finite(part):
                found.append(place)
        elif isinstance(part, float) and math.isnan(part):
            found.append(place)
    return found


def _is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if _is_sparse(tensor):
        # What is kept for one place of a COO tensor several times counts as its sum.
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # There is no arithmetic in eight bits.
    # One pass, and no copy of the state: both ends are NaN where anything is.
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


class HostMemory:
    """Copies of states in the memory of the host, which are used again by the next copy of a state of that form."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, name: str, state: Any, streams: CopyStreams) -> Any:
        """A copy of ``state`` that nothing will change until the next call for ``name``.

        Raises:
            TypeError: a part cannot be saved.
        """
        # Tied weights are one tensor under several names, and stay so in the copy.
        seen: dict[tuple[Any, ...], torch.Tensor] = {}
        return self._copied(name, state, seen, streams)

    def _copied(self, path: str, value: Any, seen: dict[tuple[Any, ...], torch.Tensor], streams: CopyStreams) -> Any:
        if is_dtensor(value):
            local = value.detach().to_local()
            return shard_of(value, self._copied_tensor(path, local, seen, streams))
        if isinstance(value, torch.Tensor):
            _check_tensor(path, value)
            return self._copied_tensor(path, value.detach(), seen, streams)
        if type(value) in (dict, Counter):
            return type(value)({key: self._copied(f"{path}.{key}", part, seen, streams) for key, part in value.items()})
        if type(value) is OrderedDict:
            copied = OrderedDict(
                (key, self._copied(f"{path}.{key}", part, seen, streams)) for key, part in value.items()
            )
            # nn.Module.state_dict notes here which version of each module wrote it.
            copied.__dict__.update(value.__dict__)
            return copied
        if type(value) in (list, tuple):
            return type(value)(self._copied(f"{path}[{n}]", part, seen, streams) for n, part in enumerate(value))
        if _is_numpy_scalar(value):
            return value.item()
        check_saveable(path, value)
        return value

    def _copied_tensor(
        self, path: str, tensor: torch.Tensor, seen: dict[tuple[Any, ...], torch.Tensor], streams: CopyStreams
    ) -> torch.Tensor:
        if _is_sparse(tensor) or tensor.is_quantized:
            streams.finish()
            return tensor.cpu().clone()
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in seen:
            return seen[identity]
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[path] = buffer
        if tensor.is_cuda:
            with torch.cuda.stream(streams.side(tensor.device)):
                buffer.copy_(tensor, non_blocking=True)
        else:
            buffer.copy_(tensor)
        seen[identity] = buffer
        return buffer


class CopyStreams:
    """The CUDA streams on which one snapshot is copied beside the training.

    ``training`` are the streams on which steps run, one for each device that was seen. The copies begin after the
    last step, the next step begins after the copies; neither makes the host wait.
    """

    def __init__(self, training: Mapping[torch.device, torch.cuda.Stream]) -> None:
        self._training = training
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[torch.cuda.Event] = []

    def side(self, device: torch.device) -> torch.cuda.Stream:
        """The stream for the copies from ``device``."""
        if device not in self._sides:
            side = torch.cuda.Stream(device)
            side.wait_stream(self._trained_on(device))
            self._sides[device] = side
        return self._sides[device]

    def close(self) -> None:
        """All copies have been asked for: the next step waits for them on the device."""
        for device, side in self._sides.items():
            self._copied.append(side.record_event())
            self._trained_on(device).wait_stream(side)

    def finish(self) -> None:
        """Wait until the copies are complete."""
        for device in self._sides:
            self._trained_on(device).synchronize()
        for event in self._copied:
            event.synchronize()

    def _trained_on(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._training.get(device)
        return torch.cuda.default_stream(device) if stream is None else stream


def nbytes(value: Any) -> int:
    """The size of the tensors in a nested state, in bytes: each tensor once, and what is spread in all processes."""
    tensors = {id(part): part for _, part in leaves("", value) if isinstance(part, (torch.Tensor, Shard))}
    return sum(_nbytes_of(tensor) for tensor in tensors.values())


def _nbytes_of(tensor: torch.Tensor | Shard) -> int:
    if isinstance(tensor, torch.Tensor) and _is_sparse(tensor):
        return sum(part.nbytes for part in _parts_of_sparse(tensor))
    return tensor.nbytes


def _is_sparse(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout in _SPARSE


def _parts_of_sparse(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The dense tensors that it is made of."""
    if tensor.layout is torch.sparse_coo:
        # Not indices(): that is for one without doubles.
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def _make_room(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Compressed sparse tensors are copied only into one of as many values."""
    with torch.no_grad():
        for name, live in itertools.chain(module.named_parameters(), module.named_buffers()):
            held: Any = saved.get(name)
            if not (_is_sparse(live) and _is_sparse(held)) or live.layout is torch.sparse_coo:
                continue
            if live.values().shape != held.values().shape:
                live.resize_as_sparse_(held)


def _shares_memory(state: Any, other: Any) -> bool:
    addresses = set(_addresses(other))
    return any(address in addresses for address in _addresses(state))


def _addresses(state: Any) -> Iterator[int]:
    for _, part in leaves("", state):
        # A DTensor has been put together from copies.
        if isinstance(part, torch.Tensor) and not is_dtensor(part):
            for one in _parts_of_sparse(part) if _is_sparse(part) else (part,):
                if one.numel():
                    yield one.untyped_storage().data_ptr()


def _compare_groups(name: str, live: Any, saved: Any, found: Misfit) -> None:
    """An optimizer knows its parameters by their order only, so their number in each group has to agree."""
    has, held = live.get("param_groups", []), saved.get("param_groups", [])
    if len(has) != len(held):
        found.reshaped[f"{name}.param_groups"] = (f"{len(has)} groups", f"{len(held)} groups")
        return
    for index, (one, other) in enumerate(zip(has, held, strict=True)):
        place = f"{name}.param_groups[{index}]"
        if len(one["params"]) != len(other["params"]):
            found.reshaped[place] = (f"{len(one['params'])} parameters", f"{len(other['params'])} parameters")
        # Without momentum, or with other betas: another optimizer.
        found.missing += [f"{place}.{key}" for key in one if key not in other]
        found.unexpected += [f"{place}.{key}" for key in other if key not in one and key != "param_names"]


def _compare_parameters(name: str, optimizer: torch.optim.Optimizer, saved: Any, found: Misfit) -> None:
    """What was kept for a parameter is given to the one in its place: in another order it would be that of another."""
    for group, held in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], held["params"], strict=True):
            for key, part in saved["state"].get(number, {}).items():
                if key in _OF_PARAMETER_SHAPE and isinstance(part, torch.Tensor) and part.shape != parameter.shape:
                    pair = str(list(parameter.shape)), str(list(part.shape))
                    found.reshaped[f"{name}.state[{number}].{key}"] = pair


def _described(state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    return f"values named {_some([str(key) for key in state])}" if state else "nothing"


def _compare_shapes(path: str, live: Any, saved: Any, found: Misfit) -> None:
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        if live.shape != saved.shape:
            found.reshaped[path] = (str(list(live.shape)), str(list(saved.shape)))
        elif live.layout != saved.layout:
            found.reshaped[path] = (str(live.layout), str(saved.layout))
    elif isinstance(live, Mapping) and isinstance(saved, Mapping):
        for key in live:
            if key in saved:
                _compare_shapes(f"{path}.{key}", live[key], saved[key], found)


def _is_saveable(holder: Any) -> bool:
    if isinstance(holder, (torch.Generator, random.Random)) or _is_numpy_generator(holder):
        return True
    return callable(getattr(holder, "state_dict", None)) and callable(getattr(holder, "load_state_dict", None))


def _gathers_state(holder: Any) -> bool:
    if not isinstance(holder, nn.Module) or not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in holder.modules())


def _unwrapped(holder: Any) -> Any:
    """The module inside those that only run it in another way: its names are the same with and without them."""
    while isinstance(holder, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(holder, "_orig_mod"):
        holder = holder._orig_mod if hasattr(holder, "_orig_mod") else holder.module
    return holder


def _is_numpy_generator(holder: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(holder, numpy.random.Generator)


def _without_arrays(state: Any) -> Any:
    """The state of a NumPy generator, with lists of numbers for the arrays that most of them keep."""
    if isinstance(state, Mapping):
        return {key: _without_arrays(part) for key, part in state.items()}
    return state.tolist() if type(state).__name__ == "ndarray" else state


def _with_arrays(state: Any, live: Any) -> Any:
    """The reverse, with arrays where ``live``, the state of such a generator, has them."""
    if isinstance(state, Mapping) and isinstance(live, Mapping):
        return {key: _with_arrays(part, live.get(key)) for key, part in state.items()}
    if type(live).__name__ != "ndarray":
        return state
    import numpy as np

    return np.array(state, dtype=live.dtype)


def _is_numpy_scalar(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
