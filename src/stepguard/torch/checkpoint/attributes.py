"""What the objects of the state keep in plain attributes, beside their ``state_dict``, and change while they train.

An annealed temperature, a BatchNorm that was set to ``eval()`` on the way, a hidden state: they may decide the next
step, and no ``state_dict`` has them. They are not put back, because one attribute alone may mean nothing without others
that no file can hold. A restart names those that had changed.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stepguard.errors import described
from stepguard.steps.attributes import attributes
from stepguard.steps.values import Values
from stepguard.torch.checkpoint.carried import LIBRARIES, codes_around, is_carried, is_set_anew, methods
from stepguard.torch.checkpoint.in_place import tensors_in
from stepguard.torch.checkpoint.names import Names
from stepguard.torch.checkpoint.state import Component, check_saveable, is_generator, is_numpy_scalar
from stepguard.torch.digests import tensor_bytes
from stepguard.words import listed, logger

_log = logger(__name__)

_PLAIN = (bool, int, float, str, type(None))
_PYTORCHS = (nn.Module, torch.optim.Optimizer)
_DAY_SECS = 86400
_MODE = "training"
# Names of PyTorch's own, such as the step count of an optimizer, unless the program's class has them too.
_INTERNAL = "_"
_MOST_MEMBERS = 1000
_MOST_NUMBERS = 100
_MOST_ELEMENTS = 1 << 18
_STEPS_SEEN = 2


class Attributes:
    """The attributes of the program's modules, optimizers and other objects. For a thread that holds the boundary."""

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = [one for one in components if isinstance(one.holder, _PYTORCHS) or _is_programs_own(one)]
        self._set_by: dict[type, frozenset[str]] = {}
        # Lists, arrays and private tensors count if they are changed in place, or computed from those before. A step
        # that puts others in their place, as one that notes its last input or loss, has most often made these anew.
        self._as_built = dict(self._changed_in_place())
        self._plain_as_built, tensors = self._look()
        self._tensors_as_built = {key: _versions(one) for key, one in tensors.items()}
        in_state = {id(one.holder) for one in components}
        generators = {id(one.holder): one for one in self._find_generators() if id(one.holder) not in in_state}
        self._generators = [(one, _comparable(one.state())) for one in generators.values()]
        # Of the run that is resumed, as long as they differ: what it had changed, and the tensors.
        self._expected: dict[str, Any] = {}
        self._expected_tensors: dict[str, Any] = {}
        self._steps_seen = 0

    def notes(self) -> dict[str, Any]:
        """The plain ones that have changed since the program was built, with both values; and the names of tensors."""
        plain, tensors = self._look()
        found = {key: one for key, one in tensors.items() if one and self._tensors_as_built.get(key) != _versions(one)}
        left = _MOST_ELEMENTS
        contents: dict[str, str] = {}
        for key, one in found.items():
            left -= sum(tensor.numel() for tensor in one)
            if left >= 0 and (digest := _digest(one)) is not None:
                contents[key] = digest
        return {
            "changed": {
                key: [self._plain_as_built.get(key), value]
                for key, value in plain.items()
                # NaN is not equal to itself.
                if repr(value) != repr(self._plain_as_built.get(key))
            },
            "tensors": list(found),
            "contents": contents,
        }

    @property
    def generators(self) -> list[Any]:
        """The generators of random numbers that modules and optimizers hold."""
        return [one.holder for one, _ in self._generators]

    def drawn(self) -> dict[str, Any]:
        """The states of those that were drawn from, by their places."""
        states = {one.name: (one.state(), built) for one, built in self._generators}
        return {name: state for name, (state, built) in states.items() if _comparable(state) != built}

    def restore_generators(self, drawn: Mapping[str, Any]) -> None:
        """Go on with them as the run that is resumed."""
        for one, _ in self._generators:
            if one.name not in drawn:
                continue
            try:
                one.load(drawn[one.name])
            except Exception as error:  # noqa: BLE001 - the program may have a generator of another kind there
                _log.warning("%s: the generator begins as the program makes it, because %s", one.name, described(error))

    def computed(self) -> dict[str, torch.Tensor]:
        """The tensors that modules compute from parameters for their next use, by their places.

        Those of ``weight_norm`` and of pruning are such: ``forward()`` makes them anew, and the end of an epoch, which
        may come before any ``forward()`` of a restart, reads what the last one has made.
        """
        return {key: vars(one)[name].detach() for key, (one, name) in self._find_computed().items()}

    def restore_computed(self, saved: Mapping[str, Any]) -> None:
        """Put back what :meth:`computed` had returned."""
        for key, (one, name) in self._find_computed().items():
            held, last = vars(one)[name], saved.get(key)
            if isinstance(last, torch.Tensor) and last.shape == held.shape:
                vars(one)[name] = last.to(held, copy=True)

    def _find_computed(self) -> dict[str, tuple[nn.Module, str]]:
        """Tensors beside a parameter of their own name: ``weight`` beside ``weight_orig`` or ``weight_g``."""
        return {
            f"{path}.{name}": (one, name)
            for path, _, one in self._objects()
            if isinstance(one, nn.Module)
            for name in {parameter.rpartition("_")[0] for parameter in one._parameters}
            if type(vars(one).get(name)) is torch.Tensor
        }

    def expect(self, notes: Mapping[str, Any]) -> None:
        """Look, from now on, for what the run that is resumed had changed, and this program has not the same."""
        # An object may have put what it has loaded in the place of its lists.
        self._as_built = dict(self._changed_in_place())
        plain, tensors = self._look()
        changed = {key: value for key, (_, value) in notes.get("changed", {}).items()}
        # What an object has loaded by itself is the same.
        self._expected = {key: value for key, value in changed.items() if repr(plain.get(key)) != repr(value)}
        contents = notes.get("contents", {})
        self._expected_tensors = {
            key: contents.get(key)
            for key in notes.get("tensors", ())
            if key not in tensors or key not in contents or _digest(tensors[key]) != contents[key]
        }
        self._steps_seen = 0

    def settle(self, *, is_last: bool = False) -> bool:
        """Warn of what differs after a first step, or a second one. Return whether there is nothing left to look at.

        Until then the program may set it again in its loop, or make a cache anew. Two steps, because one may turn over
        a flag. ``is_last`` says that no step will follow.
        """
        plain, tensors = self._look()
        changed = {key: plain.get(key) for key, value in self._expected.items() if repr(plain.get(key)) != repr(value)}
        differ = [
            key
            for key, content in self._expected_tensors.items()
            # An empty list: the step has computed it anew.
            if key not in tensors or (tensors[key] and (content is None or _digest(tensors[key]) != content))
        ]
        harmless = self._set_anew([*changed, *differ])
        changed = {key: here for key, here in changed.items() if key not in harmless and not _tells_the_time(here)}
        differ = [key for key in differ if key not in harmless]
        if changed or differ:
            there = [f"{key} ({self._expected[key]!r:.40} there, {here!r:.40} here)" for key, here in changed.items()]
            _log.warning(
                "the run had changed what no state_dict has, and it begins as the program makes it: %s. If a step "
                "depends on the step before through it, register tensors as buffers, and keep the rest in "
                "stepguard.torch.Values; what is computed anew when it is needed does no harm",
                listed([*there, *differ]),
            )
        for key in changed:
            del self._expected[key]
        for key in differ:
            del self._expected_tensors[key]
        self._steps_seen += 1
        return is_last or self._steps_seen == _STEPS_SEEN or not (self._expected or self._expected_tensors)

    def _set_anew(self, keys: list[str]) -> set[str]:
        """Those of the attributes that the steps set before they read them."""
        if not keys:
            return set()
        kinds = {f"{path}.{name}": (type(one), name) for path, _, one in self._objects() for name in attributes(one)}
        around = list(codes_around(sys._getframe(1), {kind for kind, _ in kinds.values()}))
        return {key for key in keys if key in kinds and is_set_anew(*kinds[key], around)}

    def _look(self) -> tuple[dict[str, Any], dict[str, list[torch.Tensor]]]:
        """The plain attributes, and the tensors; none for a parameter, or for results of a step."""
        plain: dict[str, Any] = {}
        tensors: dict[str, list[torch.Tensor]] = {}
        for path, root, one in self._objects():
            apart = one._non_persistent_buffers_set if isinstance(one, nn.Module) else ()
            buffers = {name: one._buffers.get(name) for name in apart}
            saved = set() if isinstance(one, _PYTORCHS) else {id(tensor) for _, tensor in tensors_in(root.state_dict())}
            for name, value in [*attributes(one).items(), *buffers.items()]:
                is_private = name.startswith(_INTERNAL)
                if is_private and name not in self._names_set_by(type(one)):
                    continue
                is_other = self._as_built.get(f"{path}.{name}") is not value
                if _counts_in_place(value, is_private=is_private) and is_other and not is_carried(type(one), name):
                    continue
                found = _as_plain(value)
                if found is not None:
                    # A program switches whole models to and fro; what stays is a module in another mode than those.
                    is_mode = name == _MODE and isinstance(root, nn.Module)
                    plain[f"{path}.{name}"] = value == root.training if is_mode else found.value
                elif name != "state":
                    held = _held_tensors(value)
                    # No look at the contents on a device, which would wait for it.
                    if held and id(held[0]) not in saved and not (name.startswith(_INTERNAL) and held[0].is_cuda):
                        tensors[f"{path}.{name}"] = [] if any(map(_is_result, held)) else held
        return plain, tensors

    def _changed_in_place(self) -> Iterator[tuple[str, Any]]:
        for path, _, one in self._objects():
            for name, value in attributes(one).items():
                if _counts_in_place(value, is_private=name.startswith(_INTERNAL)):
                    yield f"{path}.{name}", value

    def _names_set_by(self, kind: type) -> frozenset[str]:
        """The names in the methods of the program's classes; PyTorch gives each object private attributes too."""
        found = self._set_by.get(kind)
        if found is None:
            names = (one.__code__.co_names for one in methods(kind))
            found = self._set_by[kind] = frozenset(itertools.chain.from_iterable(names))
        return found

    def _find_generators(self) -> Iterator[Component]:
        for path, root, one in self._objects():
            if not isinstance(root, _PYTORCHS):
                continue  # It may be that of a loader, which has its place in the data.
            for name, value in attributes(one).items():
                # The global ones have their place in the random states.
                if is_generator(value) and value is not torch.default_generator and value is not random._inst:
                    found = Component(f"{path}.{name}", value)
                    if _has_state(found):
                        yield found

    def _objects(self) -> Iterator[tuple[str, Any, Any]]:
        for part in self._components:
            if isinstance(part.holder, nn.Module):
                names = Names(part.holder)
                for path, one in part.holder.named_modules():
                    saved = names.saved(path)
                    yield f"{part.name}.{saved}" if saved else part.name, part.holder, one
            else:
                yield part.name, part.holder, part.holder


def _is_programs_own(part: Component) -> bool:
    is_of_library = type(part.holder).__module__.partition(".")[0] in LIBRARIES
    return not (part.is_stream or is_of_library or isinstance(part.holder, Values))


def _tells_the_time(value: Any) -> bool:
    return type(value) is float and abs(value - time.time()) < _DAY_SECS


def _counts_in_place(value: Any, *, is_private: bool) -> bool:
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ndarray":
        return True
    return is_private and isinstance(value, torch.Tensor)


@dataclass(frozen=True, slots=True)
class _Plain:
    value: Any


def _as_plain(value: Any) -> _Plain | None:
    """A number or text, or a few of them, as a value that nothing changes; ``None`` for anything else."""
    if type(value) in _PLAIN:
        return _Plain(value)
    if type(value) in (list, tuple) and len(value) <= _MOST_NUMBERS:
        parts = [_as_plain(one) if not isinstance(one, (list, tuple)) else None for one in value]
        return None if None in parts else _Plain([one.value for one in parts if one is not None])
    if is_numpy_scalar(value) or (type(value).__name__ == "ndarray" and value.size <= _MOST_NUMBERS):
        return _Plain(value.tolist()) if value.dtype.kind in "biuf" else None
    return None


def _has_state(generator: Component) -> bool:
    """Whether the state of a generator can be read and saved: that of the system has none."""
    try:
        check_saveable(generator.name, generator.state())
    except Exception:  # noqa: BLE001 - the program's own class
        return False
    return True


def _comparable(state: dict[str, Any]) -> Any:
    """The state of a generator, as something to compare."""
    return {key: part.tolist() if isinstance(part, torch.Tensor) else part for key, part in state.items()}


def _held_tensors(value: Any) -> list[torch.Tensor]:
    members = value if isinstance(value, (list, tuple)) and len(value) <= _MOST_MEMBERS else [value]
    return [one for one in members if isinstance(one, torch.Tensor)]


def _is_result(tensor: torch.Tensor) -> bool:
    """Whether the tensor is part of a graph, as the result of a step is; or a parameter."""
    return tensor.grad_fn is not None or (tensor.is_leaf and tensor.requires_grad)


def _versions(tensors: list[torch.Tensor]) -> list[Any]:
    return [(id(one), _version(one)) for one in tensors]


def _digest(tensors: list[torch.Tensor]) -> str | None:
    """A digest of the contents of small tensors on the CPU; ``None`` of others."""
    if sum(one.numel() for one in tensors) > _MOST_ELEMENTS or not all(map(_is_readable, tensors)):
        return None
    found = hashlib.blake2b(digest_size=16)
    for one in tensors:
        found.update(f"{one.dtype} {tuple(one.shape)}".encode())
        found.update(tensor_bytes(one))
    return found.hexdigest()


def _is_readable(tensor: torch.Tensor) -> bool:
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return is_plain and tensor.device.type == "cpu" and not tensor.is_quantized and tensor.numel() > 0


def _version(tensor: torch.Tensor) -> int | None:
    """How often the tensor was changed in place; tensors of ``inference_mode`` do not count that."""
    return None if tensor.is_inference() else tensor._version
