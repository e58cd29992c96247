"""Finding the checkpoint to go on from, and restoring it, or saying exactly why that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepguard.options import Restoring
from stepguard.saving import restoring
from stepguard.steps.process_state import describe_positions
from stepguard.store import CheckpointStore, Recovery
from stepguard.torch.checkpoint.files import PROCESS, SUFFIX, is_process, read_file
from stepguard.torch.checkpoint.mismatch import check_fits
from stepguard.torch.checkpoint.redistribution import cut, read_sharded
from stepguard.torch.checkpoint.state import Component
from stepguard.torch.random_states import STREAMS
from stepguard.torch.session import Session

_log = logging.getLogger(__name__)

ENGINE = "torch"
"""What the manifests of this engine's checkpoints name."""


class Restorer:
    """Restores the newest good checkpoint of a store into the objects of the program."""

    def __init__(self, store: CheckpointStore, components: Sequence[Component], options: Restoring) -> None:
        self._store = store
        self._components = components
        self._options = options

    def restore_newest(self, restore: restoring.Restore) -> Recovery:
        """Have the newest good checkpoint restored; what was found has none when there is none at all.

        Raises:
            NoGoodCheckpointError: checkpoints exist, and every one is damaged.
            CheckpointMismatchError: a good checkpoint does not fit the program. Nothing was changed.
        """
        return restoring.restore_newest(self._store, restore, self._options)

    def restore_named(self, session: Session, name: str, rank: int) -> None:
        """Restore the checkpoint that the chief has verified and restored.

        Raises:
            CheckpointMismatchError: it does not fit the program. Nothing was changed.
            FileNotFoundError: this process does not see the chief's logdir.
        """
        path = self._store.root / name
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path}: the chief has restored this checkpoint, and it is not here: all need the same logdir"
            )
        self.load(path, session, rank)

    def return_to(self, path: Path, session: Session) -> None:
        """Put the objects and the step back to the checkpoint at ``path``; random states and positions go on.

        Raises:
            CheckpointMismatchError: it does not fit the program. Nothing was changed.
        """
        saved = {file.stem: file for file in sorted(path.glob(f"*{SUFFIX}"))}
        processes = {name: saved.pop(name) for name in list(saved) if is_process(name)}
        process = read_file(processes[f"{PROCESS}0"])
        states = self._fitting(path, saved, process.pop("sharded", {}), mapped=False)
        for component in self._components:
            component.put_back(states[component.name])
        session.global_step = process["global_step"]

    def load(self, path: Path, session: Session, rank: int = 0) -> None:
        """Load what the process of that ``rank`` needs to go on from the checkpoint at ``path``.

        Raises:
            CheckpointMismatchError: it does not fit the program. Nothing was changed.
        """
        saved = {file.stem: file for file in sorted(path.glob(f"*{SUFFIX}"))}
        processes = {name: saved.pop(name) for name in list(saved) if is_process(name)}
        process = read_file(processes[f"{PROCESS}0"])
        sharded = process.pop("sharded", {})
        if f"{PROCESS}{rank}" not in processes:
            # There are more processes than before: the streams of this one begin as the program has seeded them.
            process["random"] = STREAMS.capture()
        elif rank:
            # How far the epochs are is for the chief to say: it may have been a moment ahead.
            process = {**read_file(processes[f"{PROCESS}{rank}"]), "epochs": process.get("epochs")}
        # Rank 0 has just verified these files, and with that read them.
        states = self._fitting(path, saved, sharded, mapped=rank == 0)
        for component in self._components:
            component.load(states.pop(component.name))
        session.restore_process_state(process, process["global_step"])
        _log.info("going on at step %d: %s", session.global_step, describe_positions(process))

    def _fitting(
        self, path: Path, saved: dict[str, Path], sharded: Mapping[str, Any], *, mapped: bool
    ) -> dict[str, Any]:
        """All that the checkpoint holds, once it is sure that it can be put in place."""
        names = [component.name for component in self._components]
        held = [*saved, *sharded]
        states = {}
        for component in self._components:
            if component.name in held:
                # Of what is sharded these are the names and shapes.
                whole = component.name in saved
                states[component.name] = (
                    read_file(saved[component.name], mapped=mapped) if whole else sharded[component.name]
                )
        check_fits(path, self._components, held, states, is_sharded=bool(sharded))
        layouts = {component.name: component.layouts() for component in self._components}
        in_parts = {name: states[name] for name in names if name not in saved}
        if in_parts:
            states.update(read_sharded(path, in_parts, layouts))
        states.update({name: cut(name, states[name], layouts[name]) for name in names if name in saved})
        return states
