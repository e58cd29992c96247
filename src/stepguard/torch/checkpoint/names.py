"""Names of parameters that do not depend on wrappers such as ``torch.compile``.

``torch.compile(model.layer)`` and ``DistributedDataParallel(model.layer)`` put a module between ``model`` and its
layer, which adds a segment to each name below. The names in a checkpoint omit these segments.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

# What `prepare` of Accelerate returns, if the program has imported it, and the attribute with the object inside.
_ACCELERATED = (
    ("accelerate.optimizer", "AcceleratedOptimizer", "optimizer"),
    ("accelerate.scheduler", "AcceleratedScheduler", "scheduler"),
)


def unwrapped(holder: Any) -> Any:
    """The object inside all wrappers that only change how it is run."""
    while (inner := _inner_name(holder)) is not None:
        holder = getattr(holder, inner)
    return holder


def is_replicated(holder: Any) -> bool:
    """Whether a DistributedDataParallel wraps the object; it has already recorded which parameters train."""
    while (inner := _inner_name(holder)) is not None:
        if isinstance(holder, nn.parallel.DistributedDataParallel):
            return True
        holder = getattr(holder, inner)
    return False


class Names:
    """The names of one module's parameters, translated between the module and a checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        wrapped = {}
        for path, part in module.named_modules(remove_duplicate=False):
            inner = _inner_name(part)
            if inner is not None:
                wrapped[f"{path}." if path else ""] = inner
        # The longest prefix first: a segment that is cut out then never moves a segment that is still to be cut.
        self._wrapped = sorted(wrapped.items(), key=lambda one: len(one[0]), reverse=True)

    def saved(self, live: str) -> str:
        """The name in a checkpoint for the name ``live`` in the module."""
        for prefix, inner in self._wrapped:
            inside = prefix + inner
            if live == inside or live.startswith(f"{inside}."):
                live = (prefix + live[len(inside) :].removeprefix(".")).removesuffix(".")
        return live

    def as_saved(self, state: Mapping[str, Any]) -> Any:
        """A state of the module, with the names of a checkpoint."""
        return self._renamed(state, {name: self.saved(name) for name in state}) if self._wrapped else state

    def as_live(self, state: Mapping[str, Any], module: nn.Module) -> Any:
        """A saved state, with the names of ``module`` as it is now; a name that has no place there is unchanged."""
        if not self._wrapped:
            return state
        live = {self.saved(name): name for name in module.state_dict(keep_vars=True)}
        paths = {self.saved(path): path for path, _ in module.named_modules(remove_duplicate=False)}
        return self._renamed(state, {name: live.get(name, name) for name in state}, paths)

    def _renamed(
        self, state: Mapping[str, Any], names: Mapping[str, str], paths: Mapping[str, str] | None = None
    ) -> Any:
        renamed = OrderedDict((names[name], part) for name, part in state.items())
        # The version of each module that wrote the state, by the path of the module.
        versions: Mapping[str, Any] | None = getattr(state, "_metadata", None)
        if versions is not None:
            renamed._metadata = OrderedDict(  # type: ignore[attr-defined]
                (self.saved(path) if paths is None else paths.get(path, path), version)
                for path, version in _inner_last(versions)
            )
        return renamed


def parameter_names(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, str]:
    """The names of all parameters in ``modules``, by the ids of the parameters. Each begins with its module's name.

    A parameter with several names, such as a tied weight, gets the alphabetically first name, which does not depend on
    the order in which the modules are built.
    """
    found: dict[int, str] = {}
    for part, module in modules:
        names = Names(module)
        for live, parameter in module.named_parameters(remove_duplicate=False):
            name = f"{part}.{names.saved(live)}"
            found[id(parameter)] = min(name, found.get(id(parameter), name))
    return found


def _inner_name(holder: Any) -> str | None:
    """The attribute of a wrapper that has the module inside; ``None`` if ``holder`` is no wrapper."""
    if isinstance(holder, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    # Accelerate's are an optimizer by name only: they lack what the constructor of an optimizer sets.
    for module, kind, inner in _ACCELERATED:
        wrapper = getattr(sys.modules.get(module), kind, None)
        if wrapper is not None and type(holder) is wrapper:
            return inner
    # Only torch.compile imports this module. An import here would take a second.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if dynamo is not None and isinstance(holder, dynamo.OptimizedModule) else None


def _inner_last(versions: Mapping[str, Any]) -> list[tuple[str, Any]]:
    # A wrapper and its inner module have the same path in the checkpoint; the version of the inner module wins.
    return sorted(versions.items(), key=lambda one: len(one[0]))
