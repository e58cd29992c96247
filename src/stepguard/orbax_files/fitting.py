"""Decides how the values of a checkpoint go into the program's state: what is restored, left out, cast and reported."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepguard.errors import CheckpointMismatchError
from stepguard.options import Restoring
from stepguard.orbax_files.index import StoredLeaf, kind_of, orbax_name
from stepguard.orbax_files.leaves import Flat, Leaf
from stepguard.orbax_files.reading import Stored
from stepguard.saving.mismatch import Mismatch
from stepguard.saving.unfound import warn_of_unmatched
from stepguard.words import listed, logger

_log = logger(__name__)

Canonical = Callable[[Any], Any]


@dataclass(slots=True)
class Fitting:
    """Which value of a checkpoint goes into which leaf; ``None`` for a leaf that begins as the program has made it."""

    sources: list[StoredLeaf | None] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    casts: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def report(self, path: Path) -> None:
        """Warn of what makes the run another one from here on: one warning for each kind."""
        what = {
            "as the program has made them begin": self.left,
            "not taken from the checkpoint are": self.dropped,
            "of another type there, and cast, are": self.casts,
            "the static parts of the program are used where they differ": self.differences,
        }
        found = [f"{text} {listed(names)}" for text, names in what.items() if names]
        if found:
            _log.warning("%s is not restored exactly, so the run is not the same: %s", path, "; ".join(found))


def fit(path: Path, flat: Flat, stored: Stored, options: Restoring, canonical: Canonical) -> Fitting:
    """Decide how the checkpoint at ``path`` goes into a state. Nothing is read or changed.

    ``canonical`` gives the type that an array of a type gets in this program, which may have no types of 64 bits.

    Raises:
        CheckpointMismatchError: the checkpoint does not fit. The error lists all reasons.
    """
    held = {orbax_name(one.keys): one for one in stored.leaves}
    left_parts, dropped_parts = _chosen_parts(flat.leaves, stored.leaves, options)
    fitting, found = Fitting(dropped=dropped_parts), Mismatch()
    for leaf in flat.leaves:
        saved = held.pop(orbax_name(leaf.keys), None)
        is_left = _part(leaf) in left_parts or _matches(leaf.name, options.leave_out)
        fitting.sources.append(None if is_left else saved)
        if is_left:
            fitting.left += [] if _part(leaf) in left_parts else [leaf.name]
        elif saved is None:
            found.missing.append(leaf.name)
        else:
            _compare(leaf, saved, fitting, found, canonical)
    found.unexpected += [
        one.name
        for one in held.values()
        if _part(one) not in dropped_parts and not _matches(one.name, options.leave_out)
    ]
    if found:
        raise _error(path, found)
    fitting.left += left_parts
    fitting.differences += [
        f"{name} ({stored.static[name]} in the checkpoint, {flat.static[name]} in the program)"
        for name in flat.static
        if stored.static.get(name, flat.static[name]) != flat.static[name]
    ]
    return fitting


def warn_of_names(flat: Flat, stored: Stored, options: Restoring) -> None:
    """Warn of patterns in ``options`` that match no name in the program, and none in the checkpoint."""
    both: list[Leaf | StoredLeaf] = [*flat.leaves, *stored.leaves]
    warn_of_unmatched("only", options.only, map(_part, both), lambda name, pattern: _matches(name, [pattern]))
    names = (leaf.name for leaf in both)
    warn_of_unmatched("leave_out", options.leave_out, names, lambda name, pattern: _matches(name, [pattern]))


def _chosen_parts(
    leaves: Sequence[Leaf], saved: Sequence[StoredLeaf], options: Restoring
) -> tuple[list[str], list[str]]:
    """The parts (top-level keys) that are not restored, and those of the checkpoint that are not taken.

    A part that is new in the program begins anew; one that was renamed is a mismatch, which the leaves then show.
    """
    here, there = {_part(one): None for one in leaves}, {_part(one): None for one in saved}
    if options.only is not None:
        unwanted = [name for name in here if not _matches(name, options.only)]
        return unwanted, [name for name in there if not _matches(name, options.only)]
    new, gone = [name for name in here if name not in there], [name for name in there if name not in here]
    if (new and gone) or len(new) == len(here):
        return [], []
    return new, gone


def _part(leaf: Leaf | StoredLeaf) -> str:
    return str(leaf.keys[0]) if leaf.keys else leaf.name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    # In a pattern, [0] stands for the character 0, so a place in a list may also be given as .0.
    dotted = name.replace("[", ".").replace("]", "")
    return any(pattern in (name, dotted) or fnmatch.fnmatchcase(dotted, pattern) for pattern in patterns)


def _compare(leaf: Leaf, saved: StoredLeaf, fitting: Fitting, found: Mismatch, canonical: Canonical) -> None:
    own = _form(leaf)
    if isinstance(leaf.value, str) or saved.kind == "str":
        fits = isinstance(leaf.value, str) and saved.kind == "str"
    else:
        is_same_kind = kind_of(_dtype(leaf)) == kind_of(_dtype(saved))
        fits = is_same_kind and np.shape(leaf.value) == saved.shape and leaf.key_impl == saved.key_impl
    if not fits:
        found.reshaped[leaf.name] = (own, saved.form)
    elif _is_cast(leaf, saved, canonical):
        fitting.casts.append(f"{leaf.name} ({saved.form} in the checkpoint, {own} in the program)")


def _is_cast(leaf: Leaf, saved: StoredLeaf, canonical: Canonical) -> bool:
    """Whether the value changes its type. A value that the run had as another kind of object keeps its own type."""
    if saved.kind == "array":
        wanted = leaf.value.dtype if hasattr(leaf.value, "sharding") else canonical(saved.dtype)
        return bool(wanted != saved.dtype)
    is_array = saved.kind == "numpy" and isinstance(leaf.value, np.ndarray)
    return is_array and leaf.value.dtype.newbyteorder("=") != saved.dtype  # The files have one order of bytes.


def _form(leaf: Leaf) -> str:
    if not hasattr(leaf.value, "dtype"):
        return type(leaf.value).__name__
    return StoredLeaf(leaf.keys, "array", np.shape(leaf.value), np.dtype(leaf.value.dtype), leaf.key_impl).form


def _dtype(one: Leaf | StoredLeaf) -> Any:
    if isinstance(one, StoredLeaf):
        return np.asarray(one.plain).dtype if one.dtype is None else one.dtype
    return getattr(one.value, "dtype", None) or np.asarray(one.value).dtype


def _error(path: Path, found: Mismatch) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{path} does not fit this program: {found}. Nothing was changed. Start the program that wrote it, or use "
        f"another logdir; or restore a part of it with restoring=Restoring(only=..., leave_out=...)",
        path=path,
        missing=found.missing,
        unexpected=found.unexpected,
        reshaped=found.reshaped,
    )
