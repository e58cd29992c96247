"""What samplers and data sets keep in lists and arrays: the order that a sampler shuffles in place, weights, labels.

The next epoch depends on it, as on a generator's state. What has changed since the start of the process is saved.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
import xxhash

from stepguard.steps.batch_marks import mark, peek
from stepguard.words import listed, logger

_log = logger(__name__)

_PLAIN = (bool, int, float, str, bytes, type(None))
# Larger arrays are neither saved nor read in full at each checkpoint: 64 MiB take 10 ms. Lists of more values are not
# read in full either, nor are lists of lists that take more bytes than the last.
_MOST_BYTES = 64 * 2**20
_MOST_READ_VALUES = 2**20
_MOST_READ = 2**20
_MOST_VALUES = 64
# The key in the state for what has changed and was not saved.
_NOT_SAVED = "not saved"


def warn_of_other_data(loader: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn of contents that the program has not made as in the run before, such as a split that was drawn anew."""
    others = [key for key, found in now.items() if before.get(key, found) != found]
    if others:
        _log.warning(
            "%s: the program has made %s otherwise than in the run that is resumed, so the batches have other items "
            "from here on. If they are drawn, as by random_split, pass a generator with a seed, or seed the program; "
            "if they come from a folder or a set, sort them",
            loader,
            listed(others),
        )


class Contents:
    """The lists, dictionaries and arrays of plain values that ``objects`` hold as attributes."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self._objects = list({id(one): one for one in objects if hasattr(one, "__dict__")}.values())
        self._at_start = self.digests()
        # Those of the start that were replaced by a checkpoint's.
        self._originals: dict[str, Any] = {}

    def digests(self) -> dict[str, Any]:
        """Values that are others when the contents are, by the number of the object and the name."""
        return {key: _digest(value) for key, value in self._held()}

    def state(self) -> dict[str, Any]:
        """Copies of those that have changed, by the number of their object and their name."""
        found: dict[str, Any] = {}
        lost = []
        for key, value in self._held():
            if key in self._at_start and self._at_start[key] == _digest(value):
                continue
            if is_saved(value):
                found[key] = _packed(value)
            else:
                lost.append(key)
        return {**found, _NOT_SAVED: lost} if lost else found

    def put(self, saved: Mapping[str, Any], *, but: Container[str] = ()) -> None:
        """Give the objects their contents, ``but`` some; a warning names those that were too large to be saved."""
        for key, content in saved.items():
            if key in but:
                continue
            if key == _NOT_SAVED:
                _log.warning(
                    "the data has changed %s when the checkpoint was made, which are too large for a checkpoint; they "
                    "begin as the program makes them, so the items may not be those of the interrupted run",
                    listed([self._shown(one) for one in content]),
                )
                continue
            number, _, name = key.partition(".")
            if int(number) < len(self._objects):
                held = vars(self._objects[int(number)])
                if key not in self._originals and _is_content(held.get(name)):
                    self._originals[key] = _packed(held[name])
                held[name] = _put(held.get(name), content)

    def go_back(self, saved: Mapping[str, Any]) -> None:
        """Give the objects the contents that :meth:`state` has returned at an earlier moment than those of `put`."""
        self.put({**self._originals, **saved})

    def marks(self) -> dict[str, str]:
        """Digests of a few values of each, by which a start sees whether the program has made them as before."""
        return {
            self._shown(key): mark(peek(_sample(value)))
            for key, value in self._attributes()
            if (_is_content(value) and _length(value) > 1) or _is_arrays(value)
        }

    def _held(self) -> Iterator[tuple[str, Any]]:
        return ((key, value) for key, value in self._attributes() if _is_content(value))

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for number, one in enumerate(self._objects):
            for name, value in list(vars(one).items()):
                yield f"{number}.{name}", value

    def _shown(self, key: str) -> str:
        number, _, name = key.partition(".")
        return f"{type(self._objects[int(number)]).__name__}.{name}" if int(number) < len(self._objects) else name


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Tensor):
        return type(value) is torch.Tensor and value.layout is torch.strided and not value.requires_grad
    return numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in "biuf"


def _is_content(value: Any) -> bool:
    """Whether an attribute is a list, a dictionary or an array of plain values."""
    return _is_array(value) or (type(value) in (list, deque, dict) and _is_plain(value))


def is_saved(value: Any) -> bool:
    """Whether an attribute is saved when it has changed."""
    return _is_content(value) and _nbytes(value) <= _MOST_BYTES


def _is_arrays(value: Any) -> bool:
    return type(value) in (list, tuple) and 0 < len(value) < _MOST_VALUES and all(_is_array(one) for one in value)


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a list or a dictionary holds plain values only; a look at the first is enough."""
    if type(value) in _PLAIN:
        return True
    if not depth or type(value) not in (list, tuple, deque, dict):
        return False
    if not value:
        return True
    first = next(iter(value.values() if type(value) is dict else value))
    return _is_plain(first, depth - 1)


def _nbytes(value: Any) -> int:
    """The size of an array; of other contents an estimate, from the first of them."""
    if _is_array(value):
        return int(value.nbytes)
    if isinstance(value, (str, bytes)):
        return len(value)
    if not isinstance(value, (list, tuple, deque, dict)) or not value:
        return 8
    return len(value) * _nbytes(next(iter(value.values() if isinstance(value, dict) else value)))


def _length(value: Any) -> int:
    if _is_array(value):
        return int(value.shape[0]) if value.shape else 1
    return len(value)


def _digest(value: Any) -> Any:
    """A value that is another when the contents are. Of large contents only samples are read."""
    if _is_array(value):
        shape, kind = tuple(value.shape), str(value.dtype)
        if isinstance(value, torch.Tensor):
            version = value.data_ptr(), value._version
            if value.nbytes > _MOST_BYTES or value.device.type != "cpu":
                return shape, kind, version
            try:
                value = value.numpy()
            except (TypeError, RuntimeError):  # NumPy has no such numbers, as bfloat16.
                return shape, kind, version
        if value.nbytes > _MOST_BYTES:
            return shape, kind, id(value), mark(peek(value))
        content = value if value.flags.c_contiguous else value.copy()
        return shape, kind, xxhash.xxh3_64_intdigest(content.data)
    if len(value) > _MOST_READ_VALUES or (_nbytes(value) > _MOST_READ and type(next(iter(value))) not in _PLAIN):
        # Annotations, for example: to read all of them takes too long. Another order is found by samples.
        return len(value), id(value), mark(peek(_sample(value)))
    try:
        return len(value), hash(tuple(value.items()) if isinstance(value, dict) else tuple(value))
    except TypeError:
        return len(value), hash(repr(value))


def _sample(value: Any) -> Any:
    """A few values of a list; of paths only the last part, because data may lie elsewhere at the next start."""
    if _is_array(value) or _is_arrays(value):
        return value
    values = list(value.values()) if isinstance(value, dict) else list(value)
    picked = values[:: max(1, len(values) // _MOST_VALUES)][:_MOST_VALUES]
    return [len(values), repr([_without_folder(one) for one in picked])]


def _without_folder(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\\", "/").rpartition("/")[2]
    return [_without_folder(one) for one in value] if isinstance(value, (list, tuple)) else value


def _packed(value: Any) -> Any:
    """A copy of plain values and tensors, which a file can hold without code."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if _is_array(value):
        return {"array": torch.from_numpy(value.copy())}
    if isinstance(value, dict):
        return {"dict": [(key, _packed(one)) for key, one in value.items()]}
    if isinstance(value, (list, tuple, deque)):
        kind = next(name for name, one in _KINDS.items() if isinstance(value, one[0]))
        is_flat = {*map(type, value)} <= {*_PLAIN}
        return {kind: list(value) if is_flat else [_packed(one) for one in value]}
    return value


_KINDS: dict[str, tuple[type, Callable[[list[Any]], Any]]] = {
    "list": (list, list),
    "tuple": (tuple, tuple),
    "deque": (deque, deque),
}


def _put(live: Any, packed: Any) -> Any:
    """The contents of ``packed``, put into ``live`` where that is of the same kind, because others may hold it too."""
    if isinstance(packed, torch.Tensor):
        if isinstance(live, torch.Tensor) and live.shape == packed.shape and live.dtype == packed.dtype:
            return live.copy_(packed)
        return packed.clone()
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "array":
        array = content.numpy().copy()
        if _is_array(live) and live.shape == array.shape and live.dtype == array.dtype and live.flags.writeable:
            live[...] = array
            return live
        return array
    if kind == "dict":
        before = dict(live) if isinstance(live, dict) else {}
        result = {key: _put(before.get(key), one) for key, one in content}
        if not isinstance(live, dict):
            return result
        live.clear()
        live.update(result)
        return live
    known = list(live) if isinstance(live, (list, tuple, deque)) else []
    values = [_put(known[at] if at < len(known) else None, one) for at, one in enumerate(content)]
    if kind == "list" and isinstance(live, list):
        live[:] = values
        return live
    if kind == "deque":
        return deque(values, getattr(live, "maxlen", None))
    return _KINDS[kind][1](values)
