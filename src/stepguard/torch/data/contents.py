"""What samplers and data sets keep in lists and arrays: the order that a sampler shuffles in place, weights, labels.

The next epoch depends on it, as on a generator's state. What has changed since the start of the process is saved.
"""

from __future__ import annotations

import json
import marshal
import sys
import types
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import xxhash

from stepguard.steps.attributes import has_dictionary
from stepguard.steps.batch_marks import mark, peek
from stepguard.torch.digests import tensor_bytes
from stepguard.words import listed, logger

_log = logger(__name__)

_PLAIN = (bool, int, float, str, bytes, type(None))
_CONTAINERS = (list, deque, dict)
# Larger arrays are neither saved nor read in full at each checkpoint: 64 MiB take 10 ms. Longer lists are sampled.
_MOST_BYTES = 64 * 2**20
_MOST_VALUES = 2**14
_SAMPLES = 4096
_FEW_SAMPLES = 64
_MOST_ORDERED = 2**17
# Shorter lists are copied value by value.
_LONG = 1000
# The key in the state for what has changed and was not saved.
_NOT_SAVED = "not saved"


def warn_of_other_data(
    loader: str, before: Mapping[str, str], now: Mapping[str, str], *, but: Mapping[str, Any] | None = None
) -> None:
    """Warn of contents that the program has not made as in the run before, such as a split that was drawn anew.

    Those in ``but``, a state of :class:`Contents`, were put back.
    """
    restored = {_shown(key) for key in but or ()}
    others = [key for key, found in now.items() if before.get(key, found) != found and key not in restored]
    if others:
        _log.warning(
            "%s: the program has made %s otherwise than in the run that is resumed, so the batches have other items "
            "from here on. If they are drawn, as by random_split, pass a generator with a seed, or seed the program; "
            "if they come from a folder or a set, sort them",
            loader,
            listed(others),
        )


class Lists(types.SimpleNamespace):
    """Holds lists or arrays that the program has given to ``steps``, or to a loader, in the place of other objects."""


class Contents:
    """The lists, dictionaries and arrays of plain values that ``objects`` hold as attributes."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self._objects = list({id(one): one for one in objects if has_dictionary(one)}.values())
        self._at_start = self.digests()
        self._orders_at_start = self._orders()
        # Those of the start that were replaced by a checkpoint's.
        self._originals: dict[str, Any] = {}

    def digests(self) -> dict[str, Any]:
        """Values that are others when the contents are, by the number and the class of the object and the name."""
        return {key: digest(value) for key, value in self._held()}

    def state(self) -> dict[str, Any]:
        """Copies of those that have changed, by the number and the class of their object and their name."""
        found: dict[str, Any] = {}
        before = self._orders_at_start
        lost = [key for key, order in self._orders().items() if _is_reordered(before.get(key), order)]
        for key, value in self._held():
            if key in self._at_start and self._at_start[key] == digest(value):
                continue
            if is_saved(value):
                found[key] = packed(value)
            else:
                lost.append(key)
        return {**found, _NOT_SAVED: lost} if lost else found

    def put(self, saved: Mapping[str, Any], *, but: Container[str] = ()) -> None:
        """Give the objects their contents, ``but`` some; a warning names those that are not put back, and why."""
        strange = []
        for key, content in saved.items():
            if key in but:
                continue
            if key == _NOT_SAVED:
                _log.warning(
                    "the data has changed %s when the checkpoint was made, which are too large for a file, or "
                    "hold other objects; they begin as the program makes them, so the items may not be those of the "
                    "interrupted run",
                    listed([_shown(one) for one in content]),
                )
                continue
            number, kind, name = key.split(".", 2)
            one = self._objects[int(number)] if int(number) < len(self._objects) else None
            if type(one).__name__ != kind:
                strange.append(_shown(key))
                continue
            held = vars(one)
            if key not in self._originals and (name not in held or _is_original(held[name])):
                self._originals[key] = _packed_original(held, name)
            if content is None:
                held.pop(name, None)
            else:
                held[name] = put(held.get(name), content)
        if strange:
            _log.warning(
                "the checkpoint has contents of %s, which the data of this program has not; its items may not be those "
                "of the interrupted run",
                listed(strange),
            )

    def go_back(self, saved: Mapping[str, Any], *, of: Container[int] | None = None) -> None:
        """Give the objects the contents that :meth:`state` has returned at an earlier moment than those of `put`.

        With ``of``, only the objects with these identities.
        """
        others = [str(number) for number, one in enumerate(self._objects) if of is not None and id(one) not in of]
        wanted = {**self._originals, **saved}
        self.put({key: one for key, one in wanted.items() if key.partition(".")[0] not in others})

    def marks(self) -> dict[str, str]:
        """Digests of a few values of each, by which a start sees whether the program has made them as before."""
        return {
            _shown(key): mark(peek(_sample(value)))
            for key, value in self._attributes()
            if (is_content(value) and _length(value) > 1) or _is_arrays(value) or _is_items(value)
        }

    def _orders(self) -> dict[str, list[int]]:
        """The identities in lists of other objects, by which a list is known that was shuffled in place."""
        return {
            key: [*map(id, value)]
            for key, value in self._attributes()
            if type(value) is list and 1 < len(value) <= _MOST_ORDERED and not is_content(value)
        }

    def _held(self) -> Iterator[tuple[str, Any]]:
        return ((key, value) for key, value in self._attributes() if is_content(value))

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for number, one in enumerate(self._objects):
            for name, value in list(vars(one).items()):
                yield f"{number}.{type(one).__name__}.{name}", value


def _shown(key: str) -> str:
    return key.partition(".")[2]


def _is_array(value: Any) -> bool:
    """Whether a value is an array of numbers that a file can hold: dense, in memory, of the order of this machine."""
    if isinstance(value, torch.Tensor):
        is_plain = type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized
        return is_plain and not value.is_meta and not value.requires_grad
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in "biuf" and _fits(value.dtype)


def _is_text(value: Any) -> bool:
    """Whether a value is an array of strings, such as the paths of a data set."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in "US" and value.ndim == 1


def _fits(dtype: Any) -> bool:
    return bool(dtype.isnative) and dtype.itemsize <= 8


def is_content(value: Any) -> bool:
    """Whether an attribute is an array, or a list or dictionary of plain values or of tuples and lists of them.

    Of a long one samples decide.
    """
    if _is_array(value) or _is_text(value):
        return True
    return type(value) in _CONTAINERS and _is_plain(value if _is_short(value) else _picked(value))


def is_saved(value: Any) -> bool:
    """Whether an attribute is saved when it has changed."""
    is_kept = _is_array(value) or _is_text(value) or (type(value) in _CONTAINERS and _is_plain(value))
    return is_kept and _nbytes(value) <= _MOST_BYTES


def _is_short(value: Any) -> bool:
    return len(value) <= _MOST_VALUES


def _picked(value: Any, most: int = _SAMPLES) -> list[Any]:
    """At most so many values of a container, at even distances."""
    members = value if type(value) is list else list(_members(value))
    return members[:: max(1, -(-len(members) // most))]


def _is_arrays(value: Any) -> bool:
    return type(value) in (list, tuple) and 0 < len(value) < _FEW_SAMPLES and all(_is_array(one) for one in value)


def _is_items(value: Any) -> bool:
    """Whether a value is a list of items, each with arrays in it, as far as samples of it say."""
    return type(value) is list and bool(value) and all(map(_is_item, _few(value)))


def _is_item(value: Any) -> bool:
    return type(value) in (list, tuple, dict) and any(map(_is_array, _members(value)))


def _few(value: Any) -> list[Any]:
    return _picked(value, _FEW_SAMPLES)


def _is_reordered(before: list[int] | None, now: list[int]) -> bool:
    return before is not None and before != now and sorted(before) == sorted(now)


def _members(value: Any) -> Iterable[Any]:
    return value.values() if type(value) is dict else value


def _is_plain(value: Any) -> bool:
    """Whether a container holds plain values only, or containers of them."""
    if type(value) is dict and not {*map(type, value)} <= {*_PLAIN}:
        return False
    kinds = {*map(type, _members(value))}
    inner = kinds - {*_PLAIN}
    if not inner:
        return True
    if not inner <= {list, tuple}:
        return False
    inside = chain.from_iterable(one for one in _members(value) if type(one) in inner)
    return {*map(type, inside)} <= {*_PLAIN}


def _nbytes(value: Any) -> int:
    """The size of an array; of other contents an estimate, from a sample of them."""
    if _is_array(value) or _is_text(value):
        return int(value.nbytes)
    sample = _few(value)
    return len(value) * sum(map(_size, sample)) // len(sample) if sample else 0


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 8


def _length(value: Any) -> int:
    if _is_array(value):
        return int(value.shape[0]) if value.shape else 1
    return len(value)


def digest(value: Any) -> Any:
    """A value that is another when the contents are. Of large contents only samples are read."""
    if _is_text(value):
        return len(value), zlib.crc32(value.tobytes())
    if not _is_array(value):
        read = list(value.items() if type(value) is dict else value) if _is_short(value) else _picked(value)
        # The second version of the format writes each value as it is, and does not count who else holds it.
        return len(value), zlib.crc32(marshal.dumps(read, 2))
    shape, kind = tuple(value.shape), str(value.dtype)
    if isinstance(value, torch.Tensor):
        version = value.data_ptr(), None if value.is_inference() else value._version
        if value.nbytes > _MOST_BYTES or value.device.type != "cpu":
            return shape, kind, version
        content = tensor_bytes(value)
        return shape, kind, version if content is None else xxhash.xxh3_64_intdigest(content)
    if value.nbytes > _MOST_BYTES:
        return shape, kind, id(value), mark(peek(value))
    content = value if value.flags.c_contiguous else value.copy()
    return shape, kind, xxhash.xxh3_64_intdigest(content.data)


def _sample(value: Any) -> Any:
    """A few values of a list; of paths only the last part, because data may lie elsewhere at the next start."""
    if _is_array(value) or _is_arrays(value):
        return value
    if _is_items(value):
        return [len(value), *_few(value)]
    few = _few(value.tolist() if _is_text(value) else value)
    return [len(value), repr([_without_folder(one) for one in few])]


def _without_folder(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\\", "/").rpartition("/")[2]
    return [_without_folder(one) for one in value] if isinstance(value, (list, tuple)) else value


def packed(value: Any) -> Any:
    """A copy of plain values and tensors, which a file can hold without code."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if _is_text(value):
        return {"text": value.tolist()}
    if _is_array(value):
        return {"array": torch.from_numpy(value.copy())}
    if isinstance(value, dict):
        return {"dict": [(key, _copied(one)) for key, one in list(value.items())]}
    text = _as_json(value) if len(value) >= _LONG else None
    return {"deque" if isinstance(value, deque) else "list": [*map(_copied, value)] if text is None else text}


def _as_json(value: Any) -> str | None:
    """A long list as one string, because to copy thousands of tuples one by one stops the training for seconds."""
    texts = {*_PLAIN} - {bytes}
    has_tuples = {*map(type, value)} == {tuple}
    if not {*map(type, chain.from_iterable(value) if has_tuples else value)} <= texts:
        return None
    return json.dumps([has_tuples, list(value)])


def _values(content: Any) -> list[Any]:
    """The values of a list, which :func:`packed` has packed."""
    if not isinstance(content, str):
        return [*map(_copied, content)]
    has_tuples, values = json.loads(content)
    return [*map(tuple, values)] if has_tuples else values


def _is_original(value: Any) -> bool:
    return type(value) in _PLAIN or is_saved(value)


def _packed_original(held: Mapping[str, Any], name: str) -> Any:
    """What an attribute was before a checkpoint's took its place; ``None`` if it is made when it is first needed."""
    if name not in held:
        return None
    return {"plain": held[name]} if type(held[name]) in _PLAIN else packed(held[name])


def _copied(value: Any) -> Any:
    return list(value) if type(value) is list else value


def put(live: Any, packed: Any) -> Any:
    """The contents of ``packed``, put into ``live`` where that is of the same kind, because others may hold it too."""
    if isinstance(packed, torch.Tensor):
        return _put_tensor(live, packed)
    ((kind, content),) = packed.items()
    return _PUT[kind](live, content)


def _put_tensor(live: Any, content: torch.Tensor) -> torch.Tensor:
    if isinstance(live, torch.Tensor) and live.shape == content.shape and live.dtype == content.dtype:
        try:
            return live.copy_(content)
        except RuntimeError:  # Several of its elements are one in memory, or it was made in inference_mode.
            pass
    return content.clone()


def _put_array(live: Any, content: torch.Tensor) -> Any:
    array = content.numpy().copy()
    if type(live) is type(array) and live.flags.writeable and (live.shape, live.dtype) == (array.shape, array.dtype):
        live[...] = array
        return live
    return array


def _put_text(live: Any, content: list[Any]) -> Any:
    live[:] = content
    return live


def _put_dict(live: Any, content: list[tuple[Any, Any]]) -> Any:
    before = dict(live) if type(live) is dict else {}
    result = {key: _put_list(before.get(key), one) if type(one) is list else one for key, one in content}
    if type(live) is not dict:
        return result
    live.clear()
    live.update(result)
    return live


def _put_list(live: Any, content: Any) -> Any:
    values = _values(content)
    if type(live) is not list:
        return values
    live[:] = values
    return live


def _put_deque(live: Any, content: Any) -> Any:
    return deque(_values(content), getattr(live, "maxlen", None))


def _put_plain(live: Any, content: Any) -> Any:  # noqa: ARG001 - as the others
    return content


_PUT: dict[str, Callable[[Any, Any], Any]] = {
    "plain": _put_plain,
    "array": _put_array,
    "text": _put_text,
    "dict": _put_dict,
    "list": _put_list,
    "deque": _put_deque,
}
