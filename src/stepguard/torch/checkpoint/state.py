"""The state that a program saves: named objects, and the check whether each can be saved."""

from __future__ import annotations

import copy
import itertools
import random
import re
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from stepguard.errors import described
from stepguard.steps.attributes import has
from stepguard.steps.values import Values
from stepguard.torch.checkpoint.files import is_process
from stepguard.torch.checkpoint.in_place import Built, tensors_in
from stepguard.torch.checkpoint.names import Names, is_replicated, unwrapped
from stepguard.torch.checkpoint.optimizers import kept, optimizers_in
from stepguard.torch.checkpoint.sharded_tensors import Shardings, check_shardable, is_dtensor, is_sharded

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

NUMPY_TYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
}
"""The types of NumPy's numbers whose values Python's have too."""

DEQUE = "deque"
"""The kind of a deque in the notes of what a file has as something else; the most that it holds may follow it."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Component:
    """One named object of the program's state. Only a thread that holds the boundary may use it."""

    def __init__(self, name: str, holder: Any) -> None:
        self.name = name
        self.holder = unwrapped(holder)
        # A replicating wrapper records during its construction which parameters train.
        self.is_replicated = is_replicated(holder)
        # Of DistributedDataParallel, with what each keeps; a program may register one later.
        self._hooks: list[tuple[Any, Any]] = getattr(holder, "_comm_hooks", []) if self.is_replicated else []
        # PyTorch 2.13 has renamed it.
        names = ("forward_sync_buffers", "broadcast_buffers")
        self.sends_buffers = self.is_replicated and any(getattr(holder, name, False) for name in names)
        """Whether each forward pass begins with the buffers of rank 0 in all processes."""
        buffers = _buffers(self.holder) if isinstance(self.holder, nn.Module) else {}
        self.unfilled = {key: place for key, place in buffers.items() if place[0]._buffers[place[1]] is None}
        """The names in the state of a module of its buffers that are ``None`` as built: steps may make them."""
        self._buffers_built = frozenset(buffers)
        # The buffers that a restart has added, until a step registers them again.
        self._restored: dict[tuple[nn.Module, str], torch.Tensor] = {}
        self._registrations: RemovableHandle | None = None
        # Tensors in values: a variable of the program, an optimizer or a data set may hold them too.
        self._built = Built(holder.state_dict()) if isinstance(holder, Values) else None

    def state(self) -> Any:
        """The live state: dictionaries and lists with the tensors that training changes."""
        holder = self.holder
        if isinstance(holder, torch.Generator):
            return {"state": holder.get_state()}
        if isinstance(holder, random.Random):
            return {"state": holder.getstate()}
        if is_numpy_generator(holder):
            return without_arrays(holder.bit_generator.state)
        if isinstance(holder, nn.Module):
            return Names(holder).as_saved(holder.state_dict())
        return holder.state_dict()

    def load(
        self, state: Any, *, built: Collection[str] = (), added: Collection[str] = (), keeps_types: bool = True
    ) -> None:
        """Put a saved state in place. Its tensors may belong to a mapped file, so none of them is kept.

        ``built`` and ``added`` are what :meth:`built` and :meth:`added` had returned then. Without ``keeps_types`` the
        state of optimizers is cast to the types of their parameters.
        """
        holder = self.holder
        if isinstance(holder, nn.Module):
            self._make_buffers(state)
            self._add_buffers(state, added)
            state = Names(holder).as_live(state, holder)
            _make_room(holder, state)
            # This nearly always copies into the module's own tensors; if so, no tensor of the file is kept.
            tensors = itertools.chain(holder.parameters(), holder.buffers())
            with torch.inference_mode(any(one.is_inference() for one in tensors)):
                holder.load_state_dict(state)
            if not _shares_memory(holder.state_dict(), state):
                return
        # deepcopy supports only some kinds of sparse tensors, so these are cloned; and so are tensors that are parts of
        # one memory, as those of a long list in a file: each would keep all of it.
        cloned = {id(part): part.clone() for _, part in leaves("", state) if is_sparse(part) or _is_part(part)}
        state = copy.deepcopy(state, cloned)
        if isinstance(holder, torch.Generator):
            holder.set_state(state["state"])
        elif isinstance(holder, random.Random):
            holder.setstate(state["state"])
        elif is_numpy_generator(holder):
            holder.bit_generator.state = with_arrays(state, holder.bit_generator.state)
        elif self._built is not None:
            holder.load_state_dict(self._built.filled(holder.state_dict(), state, built))
        else:
            with kept(optimizers_in(self.name, holder).values(), types=keeps_types):
                holder.load_state_dict(state)

    def _make_buffers(self, saved: Mapping[str, Any]) -> None:
        """Make the buffers that the program builds as ``None``, as far as the saved state has them."""
        for key, (module, name) in self.unfilled.items():
            held, wanted = module._buffers.get(name), saved.get(key)
            if not isinstance(wanted, torch.Tensor):
                module._buffers[name] = None
            elif held is None or held.shape != wanted.shape:
                beside = next(itertools.chain(module.parameters(), self.holder.parameters()), wanted)
                module._buffers[name] = torch.empty_like(wanted, device=beside.device)

    def _add_buffers(self, saved: Mapping[str, Any], added: Collection[str]) -> None:
        """Register the buffers that the run had registered in its steps, and take away those that it had not yet."""
        for key, (module, name) in self._added().items():
            if key not in saved:
                del module._buffers[name]
        self._buffers_built -= set(added)
        for key in [one for one in added if one in saved and self.can_add(one)]:
            path, _, name = key.rpartition(".")
            module = _modules_by_path(self.holder)[path]
            beside = next(itertools.chain(module.parameters(), self.holder.parameters()), saved[key])
            module.register_buffer(name, torch.empty_like(saved[key], device=beside.device))
            self._restored[module, name] = saved[key].clone()
        if self._restored and self._registrations is None:
            self._registrations = register_module_buffer_registration_hook(self._registered)

    def _registered(self, module: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
        """The restored buffer for a first step that registers it again, as one that goes by a flag of its own."""
        restored, held = self._restored.pop((module, name), None), module._buffers.get(name)
        if restored is None or held is None or buffer is None or buffer.shape != held.shape:
            return None
        return held if torch.equal(held.cpu(), restored.cpu()) else None

    def end_start(self) -> None:
        """Note that steps were done since the restart: what they register from here on is theirs."""
        self._restored = {}
        if self._registrations is not None:
            self._registrations.remove()
            self._registrations = None

    def can_add(self, key: str) -> bool:
        """Whether the module may get a buffer of this name in its state."""
        path, _, name = key.rpartition(".")
        module = _modules_by_path(self.holder).get(path)
        return module is not None and not hasattr(module, name)

    def added(self) -> list[str]:
        """The names in the state of a module of the buffers that were registered since it was built."""
        return [*self._added()]

    def _added(self) -> dict[str, tuple[nn.Module, str]]:
        found = _buffers(self.holder) if isinstance(self.holder, nn.Module) else {}
        return {key: place for key, place in found.items() if key not in self._buffers_built}

    def built(self) -> list[str]:
        """The places of the tensors with which the program has built these values, as far as they are still there.

        Of a module, the names of the buffers that it has built as ``None``.
        """
        return [*self.unfilled] if self._built is None else self._built.places(self.holder.state_dict())

    def put_since(self) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
        """The tensors in these values that are not those with which the program has built them, by their places."""
        if self._built is None:
            return
        state = self.holder.state_dict()
        built = set(self._built.places(state))
        yield from ((place, tensor) for place, tensor in tensors_in(state) if repr(place) not in built)

    def shardings(self) -> Shardings:
        """How the tensors of this object are spread over the processes."""
        groups = self.holder.param_groups if isinstance(self.holder, torch.optim.Optimizer) else ()
        return Shardings(self.name, self.state(), [parameter for group in groups for parameter in group["params"]])

    def frozen(self) -> frozenset[str]:
        """The names, in the state of a module, of its parameters that do not train."""
        if not isinstance(self.holder, nn.Module):
            return frozenset()
        names = Names(self.holder)
        live = self.holder.named_parameters(remove_duplicate=False)
        return frozenset(names.saved(name) for name, parameter in live if not parameter.requires_grad)

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers in the state of a module, each with its name there."""
        if isinstance(self.holder, nn.Module):
            names = Names(self.holder)
            for path, part in self.holder.named_modules(remove_duplicate=False):
                for name, buffer in part._buffers.items():
                    if buffer is not None and name not in part._non_persistent_buffers_set:
                        yield names.saved(f"{path}.{name}" if path else name), buffer

    @property
    def counts_in_hooks(self) -> list[str]:
        """The kinds of what communication hooks keep, of those that count their iterations, as PyTorch's do."""
        return [type(state).__name__ for _, state in self._hooks if hasattr(state, "iter")]

    @property
    def is_per_process(self) -> bool:
        """Whether each process has a state of its own here."""
        return isinstance(self.holder, Values) and self.holder.is_per_process

    @property
    def is_giver(self) -> bool:
        """Whether a program may take batches or numbers from the object, which is no model, optimizer or schedule."""
        holder = self.holder
        return not (isinstance(holder, nn.Module) or has(holder, "param_groups") or has(holder, "optimizer"))

    @property
    def is_stream(self) -> bool:
        """Whether the object is a random number generator."""
        return is_generator(self.holder)

    def forget_gradients(self) -> None:
        """Drop accumulated gradients: their step is not done any more, and they may have been the fault."""
        if isinstance(self.holder, nn.Module):
            self.holder.zero_grad(set_to_none=True)


def components(state: Mapping[Any, Any]) -> list[Component]:
    """The named objects of the program. The state of each is read once, as a check.

    Raises:
        TypeError, ValueError: an object cannot be saved; the message names it, and the place in it.
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
        if holder is None:
            raise TypeError(f"state[{name!r}]: expected an object to save, found None: leave {name!r} out")
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
        if callable(getattr(type(holder), "consolidate_state_dict", None)):
            raise TypeError(
                f"state[{name!r}]: the state of this {type(holder).__name__} is spread over the processes, and its "
                f"state_dict is only what the last consolidate_state_dict, a collective operation, has gathered; use "
                f"an optimizer of torch.optim, and torch.distributed.fsdp.fully_shard, which spreads its state too"
            )
        component = Component(name, holder)
        try:
            live = component.state()
        except Exception as error:
            raise TypeError(
                f"state[{name!r}]: expected a state_dict that can be read after each step, found that the one of "
                f"{type(holder).__name__} raises {described(error)}"
            ) from error
        check_saveable(name, live)
        if is_sharded(live):
            check_shardable(name, live)
        found.append(component)
    return found


def check_saveable(path: str, value: Any) -> None:
    """Check that every part of a state can be saved.

    Raises:
        TypeError: a part has a type that could be restored only by running code from the file; the message names it.
    """
    for place, part in leaves(path, value):
        if isinstance(part, torch.Tensor):
            check_tensor(place, part)
        elif not (type(part) in _PLAIN or is_numpy_scalar(part)):
            is_array = type(part).__name__ == "ndarray"
            hint = "torch.from_numpy(array) can be saved" if is_array else "keep its contents in one of those"
            raise TypeError(
                f"{place}: expected a tensor, a number, a string, or a dictionary, list, tuple or deque of them, found "
                f"{type(part).__module__}.{type(part).__qualname__}, which could be restored only by running code "
                f"from the file; {hint}"
            )


def check_tensor(place: str, tensor: torch.Tensor) -> None:
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
    if tensor.layout is not torch.strided and not is_sparse(tensor):
        raise TypeError(
            f"{place}: expected a dense or a sparse tensor, found one of the layout {tensor.layout}, which cannot be "
            f"saved exactly; tensor.to_dense() can"
        )


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a nested state that are no containers, each with its place."""
    # MultiStepLR has a Counter of its milestones; since 2.4 PyTorch reads a Counter without running code.
    if type(value) in (dict, OrderedDict, Counter):
        for key, part in value.items():
            if type(key) not in _PLAIN and type(key) is not tuple:
                yield f"{path}.{key!r} (the key)", key
            yield from leaves(f"{path}.{key}", part)
    elif type(value) in (list, tuple, deque):
        for index, part in enumerate(value):
            yield from leaves(f"{path}[{index}]", part)
    else:
        yield path, value


def is_sparse(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout in _SPARSE


def parts_of_sparse(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The dense tensors that a sparse tensor consists of."""
    if tensor.layout is torch.sparse_coo:
        # indices() works only for a tensor without duplicate indices.
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def _is_part(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or is_dtensor(value) or value.layout is not torch.strided:
        return False
    return value.untyped_storage().nbytes() > max(value.nbytes, 1)


def _modules_by_path(module: nn.Module) -> dict[str, nn.Module]:
    names = Names(module)
    # The inner one of a wrapper has the same path, and comes later.
    return {names.saved(path): part for path, part in module.named_modules(remove_duplicate=False)}


def _buffers(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The buffers that a module saves, by their names in its state."""
    names = Names(module)
    return {
        names.saved(f"{path}.{name}" if path else name): (part, name)
        for path, part in module.named_modules(remove_duplicate=False)
        for name in part._buffers
        if name not in part._non_persistent_buffers_set
    }


def _make_room(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Resize compressed sparse tensors: a copy works only between tensors with the same number of values."""
    with torch.no_grad():
        for name, live in itertools.chain(module.named_parameters(), module.named_buffers()):
            held: Any = saved.get(name)
            if not (is_sparse(live) and is_sparse(held)) or live.layout is torch.sparse_coo:
                continue
            if live.values().shape != held.values().shape:
                live.resize_as_sparse_(held)


def _shares_memory(state: Any, other: Any) -> bool:
    addresses = set(_addresses(other))
    return any(address in addresses for address in _addresses(state))


def _addresses(state: Any) -> Iterator[int]:
    for _, part in leaves("", state):
        # A saved DTensor was put together from copies, so it shares no memory.
        if isinstance(part, torch.Tensor) and not is_dtensor(part):
            for one in parts_of_sparse(part) if is_sparse(part) else (part,):
                if one.numel():
                    yield one.untyped_storage().data_ptr()


def _is_saveable(holder: Any) -> bool:
    if is_generator(holder):
        return True
    return callable(getattr(holder, "state_dict", None)) and callable(getattr(holder, "load_state_dict", None))


def _gathers_state(holder: Any) -> bool:
    if not isinstance(holder, nn.Module) or not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in holder.modules())


def is_generator(holder: Any) -> bool:
    """Whether the object is a random number generator. Its type decides: some objects run code if asked for it."""
    numpy = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random, *(() if numpy is None else (numpy.random.Generator,)))
    return issubclass(type(holder), kinds)


def is_numpy_generator(holder: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(holder, numpy.random.Generator)


def without_arrays(state: Any) -> Any:
    """The state of a NumPy generator, with its arrays turned into lists of numbers."""
    if isinstance(state, Mapping):
        return {key: without_arrays(part) for key, part in state.items()}
    return state.tolist() if type(state).__name__ == "ndarray" else state


def with_arrays(state: Any, live: Any) -> Any:
    """Undo :func:`without_arrays`, with arrays in the places where the generator's state ``live`` has them."""
    if isinstance(state, Mapping) and isinstance(live, Mapping):
        return {key: with_arrays(part, live.get(key)) for key, part in state.items()}
    if type(live).__name__ != "ndarray":
        return state
    import numpy as np

    return np.array(state, dtype=live.dtype)


def with_numpys(place: str, value: Any, kinds: Mapping[str, str]) -> Any:
    """The nested state of the object at ``place`` with the numbers that were NumPy's; ``kinds`` names their types.

    A file has them as Python's, because to read others would run code from it. It has each deque as a list.
    """
    if not any(one.startswith(place) for one in kinds):
        return value
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update({key: with_numpys(f"{place}.{key}", part, kinds) for key, part in value.items()})
        return changed
    if isinstance(value, (list, tuple)):
        is_long = f"{place}[*]" in kinds
        places = (f"{place}[{'*' if is_long else number}]" for number in range(len(value)))
        parts = (with_numpys(one, part, kinds) for one, part in zip(places, value, strict=True))
        name, _, most = kinds.get(place, "").partition(" ")
        return deque(parts, int(most) if most.isdecimal() else None) if name == DEQUE else type(value)(parts)
    kind = kinds.get(place)
    if kind not in NUMPY_TYPES or not isinstance(value, (bool, int, float, complex)):
        return value
    import numpy as np

    return np.dtype(kind).type(value)


def is_numpy_scalar(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)
