"""The leaves of a state with their names, and the state made again from them.

A state is any pytree. Arrays, keys, numbers and strings are its data. What cannot be saved, such as the activation
function of an Equinox module or the optimizer in a Flax ``TrainState``, is compared as text at a restore. Objects of
Flax nnx are taken apart into a graph definition, which is compared, and a state.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from stepguard.orbax_files.index import Keys, name_of, orbax_name
from stepguard.orbax_files.leaves import PLAIN, Flat, Leaf, check_saveable, described, described_leaf
from stepguard.words import listed

_EMPTY: dict[type, str] = {dict: "Dict", list: "List", tuple: "Tuple"}


@dataclass(frozen=True, slots=True)
class _Places:
    """What all states of one structure share."""

    keys: list[Keys]
    names: list[str]
    static: Mapping[str, str]
    empty: Mapping[Keys, str]


@jax.tree_util.register_pytree_node_class
class _Split:
    """The state of an object of Flax nnx, in its place."""

    def __init__(self, state: Any, graph: Any) -> None:
        self.state = state
        self.graph = graph

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.state,), self.graph

    @classmethod
    def tree_unflatten(cls, graph: Any, children: tuple[Any]) -> _Split:
        return cls(children[0], graph)


def flatten(state: Any) -> Flat:
    """Take ``state`` apart. The training thread calls this for each snapshot; it copies nothing.

    Raises:
        TypeError: a leaf cannot be saved, or an array was donated; the message names it.
        ValueError: two leaves have the same name in Orbax's format, in which a dot separates keys.
    """
    state = _split(state)
    values, structure = jax.tree_util.tree_flatten(state)
    places = _places_of(state, structure)
    static = dict(places.static)
    leaves = []
    for keys, name, value in zip(places.keys, places.names, values, strict=True):
        kind = _KINDS.get(type(value)) or _kind_of(value)
        if kind == "array":
            if value.is_deleted():
                raise _donated(name)
            leaves.append(Leaf(keys, name, value))
        elif kind == "key":
            leaves.append(Leaf(keys, name, jax.random.key_data(value), str(jax.random.key_impl(value))))
        elif kind == "other":
            static[name] = described_leaf(name, value)
        else:
            check_saveable(name, value)
            leaves.append(Leaf(keys, name, value))
    return Flat(leaves, static, places.empty)


def rebuild(state: Any, values: list[Any]) -> Any:
    """``state`` with ``values`` in the places of its leaves, in the order of `flatten`, and keys as their data.

    Objects of nnx take their values and stay the same objects; everything else is made anew.
    """
    held, structure = jax.tree_util.tree_flatten(_split(state))
    left = iter(values)
    put = [one if _kind_of(one) == "other" else _wrapped(one, next(left)) for one in held]
    made = jax.tree_util.tree_unflatten(structure, put)
    nnx = _nnx()
    if nnx is None:
        return made

    def updated(live: Any, new: Any) -> Any:
        if not isinstance(new, _Split):
            return new
        nnx.update(live, new.state)
        return live

    return jax.tree_util.tree_map(updated, state, made, is_leaf=_is_nnx)


def _split(state: Any) -> Any:
    nnx = _nnx()
    if nnx is None:
        return state

    def one(part: Any) -> Any:
        if not _is_nnx(part):
            return part
        graph, found = nnx.split(part)
        return _Split(found, graph)

    return jax.tree_util.tree_map(one, state, is_leaf=_is_nnx)


def _nnx() -> Any:
    """The module of Flax nnx, if the program has imported it."""
    return sys.modules.get("flax.nnx")


def nnx_objects(state: Any) -> list[Any]:
    """The objects of Flax nnx in ``state``; a module with all that it holds is one."""
    return [part for part in jax.tree_util.tree_leaves(state, is_leaf=_is_nnx) if _is_nnx(part)]


def _is_nnx(part: Any) -> bool:
    nnx = _nnx()
    kind = None if nnx is None else getattr(nnx, "Pytree", None) or getattr(nnx, "Object", None)
    return kind is not None and isinstance(part, kind)


# By type, because a look at each of thousands of arrays would take longer than the rest of a snapshot.
_KINDS: dict[type, str] = {}


def _kind_of(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"expected an array, found {value}: give the session what the compiled step returns")
    if isinstance(value, jax.Array):
        kind = "key" if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key) else "array"
    else:
        kind = "plain" if isinstance(value, (np.ndarray, np.generic, *PLAIN)) else "other"
    return _KINDS.setdefault(type(value), kind)


def _donated(name: str) -> TypeError:
    return TypeError(
        f"{name}: this array was donated to a step, so it has no value any more: assign sess.state the result of the "
        f"step"
    )


def _wrapped(held: Any, value: Any) -> Any:
    if _kind_of(held) == "key":
        return jax.random.wrap_key_data(value, impl=str(jax.random.key_impl(held)))
    return value


# --- names ---


# The places of the structures that were flattened last: each snapshot has the structure of the one before.
_KNOWN: dict[Any, _Places] = {}
_MOST_KNOWN = 16


def _places_of(state: Any, structure: Any) -> _Places:
    try:
        known = _KNOWN.get(structure)
    except TypeError:  # A static part has no hash.
        return _found_places(state)
    if known is None:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[structure] = _found_places(state)
    return known


def _found_places(state: Any) -> _Places:
    static: dict[str, str] = {}
    empty: dict[Keys, str] = {}
    keys = list(_walk(state, (), static, empty))
    names = Counter(map(orbax_name, (*keys, *empty)))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"the state has two values named {listed(twice)}: a dot in a key makes them the same name")
    return _Places(keys, [name_of(one) for one in keys], static, empty)


def _walk(node: Any, keys: Keys, static: dict[str, str], empty: dict[Keys, str]) -> Iterator[Keys]:
    """The keys of the leaves below ``node``, in JAX's order."""
    if isinstance(node, _Split):
        static[name_of(keys)] = described(node.graph)
        yield from _walk(node.state, keys, {}, empty)  # The graph has what its variables keep besides values.
        return
    level = _one_level(node)
    if level is None:
        yield keys
        return
    children, aux = level
    # What a mapping keeps are its keys.
    if not isinstance(node, (Mapping, list, tuple)) and aux not in (None, ()):
        static[name_of(keys)] = described(aux)
    if not children:
        # Orbax calls an empty NamedTuple, such as optax.EmptyState, None.
        empty[keys] = _EMPTY.get(type(node), "None")
    for key, child in children:
        yield from _walk(child, (*keys, key), static, empty)


def _one_level(node: Any) -> tuple[list[tuple[str | int, Any]], Any] | None:
    """The children of a node with their keys, and what its type keeps besides them; None for a leaf."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):  # JAX gives all children the name of the first.
        return list(zip(node._fields, node, strict=True)), None
    level = jax.tree_util.default_registry.flatten_one_level_with_keys(node)
    if level is None:
        return None
    children, aux = level
    return [(_key(key), child) for key, child in children], aux


def _key(key: Any) -> str | int:
    if isinstance(key, SequenceKey):
        return int(key.idx)
    if isinstance(key, FlattenedIndexKey):
        return int(key.key)
    if isinstance(key, GetAttrKey):
        return str(key.name)
    return str(key.key) if isinstance(key, DictKey) else str(key)
