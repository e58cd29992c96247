"""Names in a module that are the same with and without what only runs a part of it in another way.

``torch.compile(model.layer)`` and ``DistributedDataParallel(model.layer)`` put a module between ``model`` and its
layer, and a segment into each name below. A checkpoint has the names without these segments.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def unwrapped(holder: Any) -> Any:
    """The object inside those that only run it in another way."""
    while (inner := _inner_name(holder)) is not None:
        holder = getattr(holder, inner)
    return holder


def is_replicated(holder: Any) -> bool:
    """Whether a wrapper around the object has already noted which of its parameters train."""
    while (inner := _inner_name(holder)) is not None:
        if isinstance(holder, nn.parallel.DistributedDataParallel):
            return True
        holder = getattr(holder, inner)
    return False


class Names:
    """The names of one module: as they are in it, and as they are in a checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        wrapped = {}
        for path, part in module.named_modules(remove_duplicate=False):
            inner = _inner_name(part)
            if inner is not None:
                wrapped[f"{path}." if path else ""] = inner
        # The longest first: what is cut out of a name then lies behind all that is still to be cut.
        self._wrapped = sorted(wrapped.items(), key=lambda one: len(one[0]), reverse=True)

    def saved(self, live: str) -> str:
        """The name in a checkpoint of what is called ``live`` in the module."""
        for prefix, inner in self._wrapped:
            inside = prefix + inner
            if live == inside or live.startswith(f"{inside}."):
                live = (prefix + live[len(inside) :].removeprefix(".")).removesuffix(".")
        return live

    def as_saved(self, state: Mapping[str, Any]) -> Any:
        """A state of the module, with the names that it has in a checkpoint."""
        return self._renamed(state, {name: self.saved(name) for name in state}) if self._wrapped else state

    def as_live(self, state: Mapping[str, Any], module: nn.Module) -> Any:
        """The reverse, for ``module`` as it is now; what has no place in it keeps its name."""
        if not self._wrapped:
            return state
        live = {self.saved(name): name for name in module.state_dict(keep_vars=True)}
        paths = {self.saved(path): path for path, _ in module.named_modules(remove_duplicate=False)}
        return self._renamed(state, {name: live.get(name, name) for name in state}, paths)

    def _renamed(
        self, state: Mapping[str, Any], names: Mapping[str, str], paths: Mapping[str, str] | None = None
    ) -> Any:
        renamed = OrderedDict((names[name], part) for name, part in state.items())
        # Which version of each module wrote it, by the path of the module.
        versions: Mapping[str, Any] | None = getattr(state, "_metadata", None)
        if versions is not None:
            renamed._metadata = OrderedDict(  # type: ignore[attr-defined]
                (self.saved(path) if paths is None else paths.get(path, path), version)
                for path, version in _inner_last(versions)
            )
        return renamed


def parameter_names(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, str]:
    """The names of all parameters in ``modules`` by their identity, each behind the name of its module.

    One that has several names, such as a tied weight, is known by the first of them in the alphabet, which is the
    same in whatever order the modules are built.
    """
    found: dict[int, str] = {}
    for part, module in modules:
        names = Names(module)
        for live, parameter in module.named_parameters(remove_duplicate=False):
            name = f"{part}.{names.saved(live)}"
            found[id(parameter)] = min(name, found.get(id(parameter), name))
    return found


def _inner_name(holder: Any) -> str | None:
    """The attribute of a wrapper that has the module inside; ``None`` for what is no wrapper."""
    if isinstance(holder, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    # Imported by torch.compile only: it takes a second.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if dynamo is not None and isinstance(holder, dynamo.OptimizedModule) else None


def _inner_last(versions: Mapping[str, Any]) -> list[tuple[str, Any]]:
    # A wrapper and the module inside share a path in the checkpoint: the version is that of the module.
    return sorted(versions.items(), key=lambda one: len(one[0]))
