"""Decides how the parts of a checkpoint go into the objects of a program: what is restored, left out, and reported.

All decisions are made, and all mismatches found, before the first object is changed.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from stepguard.errors import CheckpointMismatchError
from stepguard.options import Restoring
from stepguard.saving.mismatch import Mismatch
from stepguard.saving.unfound import warn_of_unmatched
from stepguard.torch.checkpoint import hyperparameters, optimizers
from stepguard.torch.checkpoint.hyperparameters import Difference
from stepguard.torch.checkpoint.mismatch import casts, mismatch, mismatch_error
from stepguard.torch.checkpoint.optimizers import Placement
from stepguard.torch.checkpoint.program import Program
from stepguard.torch.checkpoint.sharded_tensors import is_sharded
from stepguard.torch.checkpoint.state import Component
from stepguard.words import listed, logger

_log = logger(__name__)


@dataclass(slots=True)
class Fitting:
    """Which parts of one checkpoint go where in the program. Made by :func:`fit`."""

    program: Program
    notes: Mapping[str, Any]
    options: Restoring
    parts: list[Component]
    placements: dict[str, Placement] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    casts: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    frozen: list[str] | None = None
    names: list[str] = field(default_factory=list)
    part_names: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    """What rank 0 has saved and was something else in the rank of this process."""

    def prepare(self, states: Mapping[str, Any]) -> None:
        """Prepare the objects for their states: add the parameter groups and unfreeze the parameters as the run had."""
        for one, optimizer in self.program.optimizers():
            if one.name in self.placements:
                optimizers.add_groups(optimizer, states[one.name], self.placements[one.name])
        if self.frozen is not None:
            for name, parameter in self.program.parameters().items():
                parameter.requires_grad_(name not in self.frozen)

    def load(self, part: Component, saved: Any) -> None:
        """Put the state of one object in place.

        Raises:
            CheckpointMismatchError: the object itself has refused the state. Earlier objects are already loaded.
        """
        saved = self._as_program_has_it(part, saved)
        try:
            # A program in another type than the checkpoint has its moments in that type too.
            built = self.notes.get("built", {}).get(part.name, ())
            is_partial = self.options.only is not None or self.options.leave_out
            if is_partial and not isinstance(part.holder, nn.Module):
                built = ()  # A tensor of these values may be one of a part that is left alone.
            added = self.notes.get("added", {}).get(part.name, ())
            part.load(saved, built=built, added=added, keeps_types=not self.casts)
        except Exception as error:
            raise CheckpointMismatchError(
                f"{part.name}: {type(part.holder).__name__}.load_state_dict has refused the state of the checkpoint, "
                f"and may have taken a part of it: {error}. Build the objects of the state anew before the next try, "
                f"or leave this one out with restoring=Restoring(only=...)"
            ) from error

    def _as_program_has_it(self, part: Component, saved: Any) -> Any:
        if isinstance(part.holder, nn.Module):
            return self._without_left_out(part, saved)
        if part.name in self.placements:
            saved = optimizers.placed(saved, self.placements[part.name])
        found = [one for one in self.differences if one.part == part.name]
        return hyperparameters.with_programs(part, saved, found, self.set_before(part.name))

    def _without_left_out(self, part: Component, saved: Any) -> Any:
        """The saved state of a module, with the live values in the places that are left out."""
        live = part.state()
        left = {key for key in {*live, *saved} if self.is_left_out(f"{part.name}.{key}")}
        if not left:
            return saved
        state = copy.copy(saved)
        for key in left:
            state.pop(key, None)
        state.update({key: live[key] for key in live if key in left})
        return state

    def is_left_out(self, name: str) -> bool:
        """Whether this parameter or buffer is not restored, and begins as the program has made it."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.options.leave_out)

    def set_before(self, name: str) -> hyperparameters.Settings:
        settings: hyperparameters.Settings = self.notes.get("settings", {}).get(name, {})
        return settings

    def note_winners(self) -> None:
        """After loading, record the hyperparameters that are in force: the program's or the checkpoint's."""
        found, self.differences = self.differences, []
        for part in self.parts:
            self.differences += hyperparameters.in_force(part, [one for one in found if one.part == part.name])
        for one in self.differences:
            if not one.program_wins:
                self.program.in_force[one.part] = {**self.program.in_force[one.part], one.place: one.in_checkpoint}

    def report(self, path: Path) -> None:
        """Warn of parts that were not restored, of casts, and of hyperparameters that differ: one warning for each."""
        if self.left or self.dropped:
            parts = [f"restored are {listed([one.name for one in self.parts])}"] if self.parts else []
            if self.left:
                parts.append(f"as the program has made them begin {listed(self.left)}")
            if self.dropped:
                parts.append(f"not taken from the checkpoint are {listed(self.dropped)}")
            _log.warning("%s is restored in part, so the run is not the same from here on: %s", path, "; ".join(parts))
        if self.casts:
            _log.warning(
                "%s holds tensors of another type than the program. They were cast, so the run is not the same from "
                "here on: %s",
                path,
                listed(self.casts),
            )
        moved = [one for placement in self.placements.values() for one in placement.moved]
        if moved:
            _log.warning(
                "the program has parameters in other groups than %s, with other hyperparameters, so the run is not the "
                "same from here on: %s. To go on as before, build the groups as they were",
                path,
                listed(moved),
            )
        self._report_differences(path)
        warn_of_unmatched("only", self.options.only, self.part_names)
        warn_of_unmatched("leave_out", self.options.leave_out, self.names)

    def _report_differences(self, path: Path) -> None:
        outcomes = {
            False: "the checkpoint's are used, so that the run goes on as it was; restoring=Restoring(hyperparameters="
            "'program') uses those of the program",
            True: "those of the program are used, so the run is not the same from here on",
        }
        for program_wins, outcome in outcomes.items():
            found = [str(one) for one in self.differences if one.program_wins is program_wins]
            if found:
                _log.warning(
                    "the program sets a learning rate or another hyperparameter differently from %s: %s: %s",
                    path,
                    listed(found),
                    outcome,
                )


def fit(
    path: Path, program: Program, states: Mapping[str, Any], notes: Mapping[str, Any], options: Restoring
) -> Fitting:
    """Decide how the checkpoint at ``path`` goes into the program, without changing anything.

    ``states`` are the states of all parts of the checkpoint.

    Raises:
        CheckpointMismatchError: the checkpoint does not fit. The error lists all reasons.
    """
    found = Mismatch()
    fitting = _chosen(program, states, notes, options, found)
    for part in fitting.parts:
        saved = states[part.name]
        built = notes.get("built", {}).get(part.name)
        added = notes.get("added", {}).get(part.name, ())
        reasons = mismatch(part, saved, is_left_out=fitting.is_left_out, built=built, added=added)
        if isinstance(part.holder, torch.optim.Optimizer) and optimizers.is_of_optimizer(saved) and not reasons:
            _place(fitting, part, saved, reasons)
        was, now = fitting.set_before(part.name).get("class"), type(part.holder).__name__
        if isinstance(part.holder, LRScheduler) and was not in (None, now):
            reasons.reshaped[part.name] = (f"the state of a {now}", f"that of a {was}")
        found.add(reasons)
    if found:
        raise mismatch_error(path, found, [*states])
    for part in fitting.parts:
        fitting.left += [name for name in _names_in(part) if fitting.is_left_out(name)]
        fitting.casts += casts(part, states[part.name])
        fitting.differences += _differences(fitting, part, states[part.name])
    _unfreeze(fitting)
    held = [f"{name}.{key}" for name, state in states.items() if isinstance(state, Mapping) for key in state]
    fitting.names = [*program.parameters(), *(name for part in program.components for name in _names_in(part)), *held]
    fitting.part_names = [*(part.name for part in program.components), *states]
    return fitting


def _chosen(
    program: Program, held: Mapping[str, Any], notes: Mapping[str, Any], options: Restoring, found: Mismatch
) -> Fitting:
    """Choose the parts to restore. A part that is new in the program begins anew; a renamed part is a mismatch."""
    wanted = [
        part
        for part in program.components
        if options.only is None or any(fnmatch.fnmatchcase(part.name, pattern) for pattern in options.only)
    ]
    fitting = Fitting(program, notes, options, [part for part in wanted if part.name in held])
    missing = [part.name for part in wanted if part.name not in held]
    names = [part.name for part in program.components]
    fitting.dropped = [name for name in held if name not in [part.name for part in fitting.parts]]
    unknown = [name for name in fitting.dropped if name not in names]
    if missing and (options.only is not None or unknown or not fitting.parts):
        found.missing += missing
        found.unexpected += unknown
    fitting.left = [name for name in names if name not in [part.name for part in fitting.parts]]
    return fitting


def _place(fitting: Fitting, part: Component, saved: Any, found: Mismatch) -> None:
    program = fitting.program
    placement = optimizers.place(
        part.name,
        program.group_names(part.name),
        saved,
        fitting.notes.get("parameters", {}).get(part.name),
        program.parameters(),
        fitting.is_left_out,
        found,
    )
    if placement.is_reordered and (is_sharded(saved) or part.shardings().are_any):
        found.reshaped[part.name] = ("its parameters in the order of the program", "sharded ones in another order")
    if not found:
        optimizers.check_placed(part.name, part.holder, saved, placement, found)
    fitting.placements[part.name] = placement


def _differences(fitting: Fitting, part: Component, saved: Any) -> list[Difference]:
    set_now, set_before = fitting.program.settings[part.name], fitting.set_before(part.name)
    is_programs = fitting.options.hyperparameters == "program"
    return hyperparameters.differences(part, saved, set_now, set_before, all_of_program=is_programs)


def _unfreeze(fitting: Fitting) -> None:
    """Let the same parameters train as in the saved run, if the program freezes the same ones when it is built."""
    program, before = fitting.program, fitting.notes.get("frozen as built")
    names = program.parameters().keys()
    if before is None or {*before} & names != {*program.frozen_as_built} & names:
        return
    frozen = fitting.notes["frozen"]
    changed = [name for name, one in program.parameters().items() if one.requires_grad == (name in frozen)]
    if changed and not any(part.is_replicated for part in fitting.parts):
        _log.info("trained or not as in the run that was saved: %s", listed(changed))
        fitting.frozen = list(frozen)


def _names_in(part: Component) -> Sequence[str]:
    return [f"{part.name}.{key}" for key in part.state()] if isinstance(part.holder, nn.Module) else ()
