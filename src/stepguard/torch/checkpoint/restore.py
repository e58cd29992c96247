"""Finds and restores the checkpoint from which a run continues, or reports exactly why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepguard.errors import CheckpointCorruptError
from stepguard.options import Restoring
from stepguard.saving import restoring
from stepguard.steps.process_state import describe_positions
from stepguard.store import CheckpointStore, Recovery
from stepguard.torch.checkpoint.files import (
    APART,
    PROCESS,
    frozen_files,
    is_process,
    named_files,
    process_file,
    read_file,
)
from stepguard.torch.checkpoint.fitting import Fitting, fit
from stepguard.torch.checkpoint.frozen import joined
from stepguard.torch.checkpoint.of_rank import BEGUN, OWN, SAMPLED, put_own, unlike
from stepguard.torch.checkpoint.optimizers import optimizers_in
from stepguard.torch.checkpoint.process_state import read_process
from stepguard.torch.checkpoint.program import Program
from stepguard.torch.checkpoint.redistribution import cut, read_sharded
from stepguard.torch.checkpoint.state import with_numpys
from stepguard.torch.random_states import STREAMS
from stepguard.torch.session import Session
from stepguard.words import listed, logger

_log = logger(__name__)


class Restorer:
    """Restores the newest good checkpoint of a store into the objects of the program."""

    def __init__(self, store: CheckpointStore, program: Program, options: Restoring) -> None:
        self._store = store
        self._program = program
        self._options = options

    def restore_newest(self, restore: restoring.Restore) -> Recovery:
        """Restore the newest good checkpoint; the result has ``checkpoint=None`` if there are no checkpoints.

        Raises:
            NoGoodCheckpointError: checkpoints exist, but all are damaged.
            CheckpointMismatchError: a good checkpoint does not fit the program. Nothing was changed.
        """
        return restoring.restore_newest(self._store, restore, self._options)

    def restore_named(self, session: Session, name: str, rank: int) -> Path:
        """Restore the checkpoint ``name``, which the chief has verified and restored. Returns its path.

        Raises:
            CheckpointMismatchError: the checkpoint does not fit the program. Nothing was changed.
            FileNotFoundError: this process does not see the chief's logdir.
        """
        path = self._store.root / name
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path}: the chief has restored this checkpoint, and it is not here: all need the same logdir"
            )
        self.load(path, session, rank)
        return path

    def return_to(self, path: Path, session: Session, rank: int = 0, *, with_streams: bool = False) -> None:
        """Reset the objects and the step to the checkpoint at ``path``. Random states and data positions are kept.

        Generators among the objects are kept too, unless ``with_streams`` is set. The process is that of ``rank``.

        Raises:
            CheckpointMismatchError: the checkpoint does not fit the program. Nothing was changed.
        """
        process, files, is_of_rank = _files(path, rank, session.process_state.processes)
        fitting, states = self._fitting(path, files, process, Restoring(), mapped=False)
        for part in fitting.parts:
            if with_streams or not part.is_stream:
                fitting.load(part, states[part.name])
                part.forget_gradients()
        if is_of_rank:
            session.restore_own(process)
        session.global_step = process["global_step"]

    def load(self, path: Path, session: Session, rank: int = 0) -> None:
        """Load the state with which the process of ``rank`` continues from the checkpoint at ``path``.

        Raises:
            CheckpointMismatchError: the checkpoint does not fit the program. Nothing was changed.
        """
        process, files, is_of_rank = _files(path, rank, session.process_state.processes)
        # Rank 0 has just verified these files, which reads them to their ends, so it may map them.
        fitting, states = self._fitting(path, files, process, self._options, mapped=rank == 0)
        for part in fitting.parts:
            fitting.load(part, states.pop(part.name))
        fitting.note_winners()
        if rank == 0:
            self._program.attributes.expect(fitting.notes.get("attributes", {}))
            fitting.report(path)
            self._warn_of_hooks()
        if process["global_step"]:
            for optimizer in (one for part in fitting.parts for one in optimizers_in(part.name, part.holder).values()):
                # The steps of before count: a scheduler that now comes first is not too early, as PyTorch would warn.
                vars(optimizer)["_opt_called"] = True
        if fitting.unlike:
            _log.warning(
                "%s holds these as rank 0 had them, and this process, rank %d, had others. It goes on with those of "
                "rank 0, so the run is not the same from here on: %s. Put what differs between ranks into "
                "Values(per_process=True), and wrap what should not differ in DistributedDataParallel",
                path,
                rank,
                listed(fitting.unlike),
            )
        if not is_of_rank:
            # There are more processes than before. The random streams of this one begin as the program has seeded them.
            process["random"] = STREAMS.capture()
            process.pop("own", None)
            process.pop("place", None)
            process.pop("generators", None)
        session.restore_process_state(process, process["global_step"])
        _log.info("going on at step %d: %s", session.global_step, describe_positions(process))

    def _warn_of_hooks(self) -> None:
        for part in self._program.components:
            if part.counts_in_hooks:
                _log.warning(
                    "%s: a communication hook of this model keeps a %s, which is not saved and begins anew, so the run "
                    "is not the same from here on. For an exact restart, use a hook that keeps nothing",
                    part.name,
                    listed(part.counts_in_hooks),
                )

    def _fitting(
        self, path: Path, files: Mapping[str, Path], process: dict[str, Any], options: Restoring, *, mapped: bool
    ) -> tuple[Fitting, dict[str, Any]]:
        """Decide how the checkpoint goes into the program; return that, and the states. Raise if any does not fit."""
        # For sharded objects these are skeletons: names and shapes.
        states = {
            **process.pop("sharded", {}),
            **{name: read_file(file, mapped=mapped) for name, file in files.items()},
        }
        apart = process.pop(APART, {})
        for name, file in frozen_files(path).items():
            rest = states[name] if name in files else None
            states[name] = joined(name, rest, read_file(file, mapped=mapped), apart)
        for part in self._program.components:
            if part.name in states:
                states[part.name] = with_numpys(part.name, states[part.name], process.get("numpys", {}))
        others = unlike(states, process)
        own = process.pop(OWN, {})
        fitting = fit(path, self._program, states, process.pop("program", {}), options)
        fitting.prepare(states)
        shardings = {part.name: part.shardings() for part in fitting.parts}
        in_parts = {name: states[name] for name in shardings if name not in files}
        if in_parts:
            states.update(read_sharded(path, in_parts, shardings))
        states.update({name: cut(name, states[name], shardings[name]) for name in shardings if name in files})
        others += put_own(states, own)
        names = [part.name for part in fitting.parts]
        places = [f"{name}.{key}" if key else name for name, key in others if name in names]
        fitting.unlike = [place for place in places if not fitting.is_left_out(place)]
        return fitting, states


def _files(path: Path, rank: int, count: int) -> tuple[dict[str, Any], dict[str, Path], bool]:
    """The content of the process file of ``rank`` in the checkpoint at ``path``, and the files of whole parts by name.

    The last value says whether that rank took part in the save; if not, the process file of rank 0 is returned. Keys
    that only the chief writes are always taken from rank 0. What was saved for one rank is for as many processes, whose
    number is ``count``.
    """
    found = {file.stem: file for file in named_files(path)}
    processes = {name: found.pop(name) for name in list(found) if is_process(name)}
    if f"{PROCESS}0" not in processes:
        raise CheckpointCorruptError(
            f"{path}: expected the file {process_file(0)} in its manifest, found none", path=path
        )
    process = read_process(processes[f"{PROCESS}0"])
    own = processes.get(f"{PROCESS}{rank}")
    if rank and own is not None:
        # The rest is of the rank's own moment, which with uneven inputs may be the end of the loop that the chief runs.
        of_chief = {key: process[key] for key in ("sharded", "program", APART, BEGUN) if key in process}
        mine = read_process(own)
        if len(processes) != count:
            mine.pop(OWN, None)
        if len(processes) != count or mine["global_step"] != process["global_step"]:
            mine.pop(SAMPLED, None)
        process = {**mine, **of_chief, "numpys": {**process.get("numpys", {}), **mine.get("numpys", {})}}
    return process, found, own is not None
