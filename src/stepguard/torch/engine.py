"""The engine of PyTorch programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepguard.coordination.coordinator import Coordinator
from stepguard.disk import files
from stepguard.engine import Beginning, Prepared, StepTrace
from stepguard.errors import CheckpointMismatchError
from stepguard.options import Restoring
from stepguard.steps.gate import Gate
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.peers_engine import PeersEngine
from stepguard.steps.step_digests import StepDigests
from stepguard.store import Checkpoint, Recovery
from stepguard.torch.checkpoint.arena import coming_bytes
from stepguard.torch.checkpoint.files import APART, ENGINE, SUFFIX, frozen_file, process_file, write_file
from stepguard.torch.checkpoint.first_weights import take_first_weights
from stepguard.torch.checkpoint.frozen import DIRECTORY, split
from stepguard.torch.checkpoint.of_rank import BEGUN, Samples
from stepguard.torch.checkpoint.program import Program
from stepguard.torch.checkpoint.restore import Restorer
from stepguard.torch.checkpoint.sharded_tensors import is_sharded, skeleton
from stepguard.torch.checkpoint.snapshot import CopyStreams, HostMemories, TorchSnapshot, nbytes, non_finite
from stepguard.torch.data.outliving import let_workers_outlive_signals
from stepguard.torch.data.persistent import keep_from_persistent_loaders
from stepguard.torch.digests import fingerprint, hyperparameters, tensor_bytes
from stepguard.torch.distributed.joint_write import collect_processes, write_all
from stepguard.torch.distributed.member import TorchMember
from stepguard.torch.distributed.world import shared_store, world
from stepguard.torch.events import TorchEvents
from stepguard.torch.random_states import STREAMS
from stepguard.torch.session import Session
from stepguard.words import listed, logger

_log = logger(__name__)


class TorchEngine(PeersEngine[Session]):
    """The engine over the objects that a program saves. For threads see :class:`stepguard.engine.Engine`."""

    def __init__(
        self,
        program: Program,
        *,
        root: Path | None,
        restoring: Restoring,
        restorer: Restorer | None,
        events: TorchEvents | None,
        basename: str,
        summaries: Callable[[], Mapping[str, Any]] | None,
        init_fn: Callable[[], object] | None,
        coord: Coordinator,
        stop_grace_secs: float,
        frozen_apart: bool,
    ) -> None:
        rank, processes = world()
        super().__init__(
            rank=rank,
            processes=processes,
            common=shared_store() if processes > 1 else None,
            grace_secs=stop_grace_secs,
            basename=basename,
            events=events,
        )
        self.name = ENGINE
        self._program = program
        self._root = root
        self._restoring = restoring
        self._restorer = restorer
        self._summaries = summaries
        self._init_fn = init_fn
        self._coord = coord
        self._frozen_apart = frozen_apart
        self._memories = HostMemories()
        self._sampled: Mapping[str, Any] = {}
        self._begun: Mapping[str, Any] = {}
        self._begun_rates: Mapping[str, float] = {}
        self._new_work: Sequence[str] = ()
        self._rates_before: Mapping[str, float] = {}

    # --- the session ---

    def prepare(self, meets_every: int | None = None) -> Prepared[Session]:
        """Prepare a session from the newest good checkpoint; without one, from the model as it is.

        ``meets_every``: see `PeersEngine.prepare_session`.
        """
        holders = {one.name: one.holder for one in self._program.components}

        def new_session(gate: Gate | None) -> Session:
            return Session(
                self._coord,
                self.write_summary,
                gate=gate,
                processes=self.peers.size,
                holders=holders,
                own=self._program.own,
                attributes=self._program.attributes,
                components=self._program.components,
            )

        prepared = self.prepare_session(new_session, meets_every)
        # What the program changes before its first loop is undone if the run goes on in a loop.
        if self.peers.size > 1 and not self.peers.rank:
            with torch.no_grad():
                self._sampled = {BEGUN: Samples(self._live_state(), {}).digests()}
        self._begun, self._begun_rates = self._fingerprints(), self._hyperparameters()
        prepared.session.call_before_loops(functools.partial(self._note_work_before, prepared.session))
        let_workers_outlive_signals()
        keep_from_persistent_loaders(prepared.session)
        return prepared

    def new_member(self, session: Session) -> TorchMember:
        """This process's part of checkpoints."""
        components = self._program.components
        return TorchMember(
            self._coord, session, components, self._root, lambda: self.value_watch is not None, self._frozen_apart
        )

    def initialise(self, session: Session) -> None:  # noqa: ARG002 - the program holds its own state
        """Begin with the model as the program has built it, or with the weights of another run."""
        if self._init_fn is not None:
            self._init_fn()
        take_first_weights(self._program, self._restoring)

    def restore(self, session: Session, checkpoint: Checkpoint, *, in_run: bool = False) -> None:
        """Load the state into the objects of the program."""
        if self._restorer is None:
            raise AssertionError("a session without a logdir has no checkpoint to restore")
        if not in_run:
            self._restorer.load(checkpoint.path, session)
            self._note_restored(self._restorer, session, checkpoint.path)
            return
        _synchronize()
        self._restorer.return_to(checkpoint.path, session)
        # The loads may run on another CUDA stream than the training.
        _synchronize()

    def _note_restored(self, restorer: Restorer, session: Session, path: Path) -> None:
        # With options for restoring, the program's changes to the state may be intended.
        if self._restoring == Restoring():
            session.put_back_with(functools.partial(self._put_back, restorer, path, session))

    def _note_work_before(self, session: Session) -> None:
        """Note what the program has changed in this session before its first loop."""
        found = self._fingerprints()
        changed = [name for name, one in found.items() if one != self._begun.get(name)]
        self._rates_before = self._hyperparameters()
        begun = self._begun_rates
        rates = {
            name: (begun[name], rate) for name, rate in self._rates_before.items() if begun.get(name, rate) != rate
        }
        self._new_work = session.process_state.note_work_before(changed, rates, begun)

    def _put_back(self, restorer: Restorer, path: Path, session: Session, with_streams: bool) -> None:
        """Reset the objects, before the first step, to the state that the session was restored with."""
        found = self._fingerprints()
        changed = [name for name, one in found.items() if one != self._begun.get(name)]
        own = session.process_state.own
        taken = own.digests()
        if changed or own.held_before:
            try:
                restorer.return_to(path, session, self.peers.rank, with_streams=with_streams)
            except CheckpointMismatchError as error:
                _log.warning("the program has changed what the state consists of before its first step: %s", error)
                return
            _log.info("put back, because it was done before the checkpoint: what the program changed in %s", changed)
        _tell_of_new_work(self._new_work, self._rates_before, self._hyperparameters())
        own.tell_of_taken(changed, taken)
        session.put_gradients_back()
        if with_streams:
            session.put_modes_back()

    def _fingerprints(self) -> dict[str, Any]:
        """What tells, by the names of the objects, whether the program has changed one."""
        with torch.no_grad():
            components = (*self._program.components, *self._program.own)
            return {one.name: _fingerprint(one.state()) for one in components}

    def go_on(self, session: Session) -> tuple[Recovery | None, bool]:
        """The result of this process's own search, and whether the session was restored (perhaps as the chief said)."""
        found: list[Recovery] = []

        def restore_newest() -> str | None:
            if self._restorer is None:
                return None
            found.append(self._restorer.restore_newest(functools.partial(self.restore, session)))
            good = found[0].checkpoint
            return None if good is None else good.name

        def restore_named(name: str) -> None:
            if self._restorer is not None:
                path = self._restorer.restore_named(session, name, self.peers.rank)
                self._note_restored(self._restorer, session, path)

        name = self.peers.restored(restore_newest, restore_named)
        return next(iter(found), None), name is not None

    def trace_steps(self, session: Session, trace: StepTrace) -> Beginning:
        """The session tells ``trace`` the numbers that it summarises, and the digests that ``trace`` wants."""
        digests = None
        if trace.wants_digests:
            digests = StepDigests(
                trace, STREAMS, state=self._live_state, settings=self._hyperparameters, as_bytes=tensor_bytes
            )
        return session.trace_with(trace, digests)

    def _live_state(self) -> dict[str, Any]:
        with torch.no_grad():
            return {one.name: one.state() for one in self._program.components}

    def _hyperparameters(self) -> dict[str, float]:
        return hyperparameters((one.name, optimizer) for one, optimizer in self._program.optimizers())

    # --- checkpoints ---

    def make_room(self, session: Session) -> None:
        """Copy the state once, and make room for what the optimizers will add to it in their first step."""
        self._memories = HostMemories()
        memory = self._memories.free()
        copies = CopyStreams(session.training_streams)
        with torch.no_grad():
            for one in self._program.components:
                memory.copy(one.name, one.state(), copies)
            copies.close()
        copies.finish()
        memory.make_room(coming_bytes(one for _, one in self._program.optimizers()))
        self._memories.keep(memory)

    def snapshot(self, session: Session) -> TorchSnapshot:
        """Copy the state into host memory, which is reused when its snapshot is no longer referenced."""
        memory = self._memories.free()
        copies = CopyStreams(session.training_streams)
        with torch.no_grad():
            states = {one.name: memory.copy(one.name, one.state(), copies) for one in self._program.components}
            own = memory.copy("process", session.process_state.capture(), copies)
            process = {**own, **self._sampled, "program": self._program.notes(), "numpys": memory.numpys}
            self._program.warn_of_shared()
            frozen = {one.name: one.frozen() for one in self._program.components} if self._frozen_apart else {}
            copies.close()
        self._memories.keep(memory, copies)
        return TorchSnapshot(
            session.global_step, states, process, nbytes(states), copies, session.moment, frozen=frozen
        )

    def non_finite(self, snapshot: Any) -> Sequence[str]:
        """The places of tensors with NaN or infinity, and of plain numbers that are NaN."""
        snapshot.finish()
        return [place for name, state in snapshot.states.items() for place in non_finite(name, state)]

    def write(self, snapshot: Any, stage: Path, name: str) -> Mapping[str, tuple[int, str]]:
        """Write a directory with one file for each object, which ``torch.load(weights_only=True)`` reads.

        Sharded objects go to the files of ``torch.distributed.checkpoint``, which all processes write.
        """
        snapshot.finish()
        directory = stage / name
        written = self.write_jointly(
            directory,
            self._root,
            snapshot.moment,
            functools.partial(self._write_own, snapshot, directory),
            collect_processes,
        )
        return {f"{name}/{file}": digest for file, digest in written.items()}

    def _write_own(self, snapshot: Any, directory: Path, messages: PartMessages | None) -> dict[str, tuple[int, str]]:
        sharded = {part: state for part, state in snapshot.states.items() if is_sharded(state)}
        process = {"global_step": snapshot.step, **snapshot.process}
        written, digests = {}, {}
        for part in [one for one in snapshot.states if one not in sharded]:
            state, frozen, places = split(snapshot.states[part], snapshot.frozen.get(part, ()))
            written[f"{part}{SUFFIX}"] = state
            if frozen:
                written[frozen_file(part)] = frozen
                process.setdefault(APART, {})[part] = places
        written[process_file(0)] = process
        if APART in process:
            files.make_own_dir(directory / DIRECTORY)
        if sharded:
            # The sharded format loses integer keys and empty containers; the skeleton keeps the structure.
            process["sharded"] = {part: skeleton(part, state) for part, state in sharded.items()}
            digests = write_all(messages, directory, sharded, snapshot.frozen)
        return digests | {file: write_file(directory / file, state) for file, state in written.items()}

    # --- summaries ---

    def summarise(self, session: Session) -> None:
        """Evaluate the program's summary function between two steps, without moving the random states.

        It is not called after the last step of a loop, because the program may then use the model in another mode.
        """
        if self._summaries is None or self._events is None:
            return
        with session.boundary.hold("a summary"), STREAMS.preserved(), torch.no_grad():
            if session.boundary.is_resting:
                return
            values, step = self._summaries(), session.global_step
        _log.info("recording summary at step %d", step)
        self.write_summary(values, step, where="summaries")


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def _fingerprint(state: Any) -> Any:
    try:
        return fingerprint(state)
    except Exception:  # noqa: BLE001 - any kind of tensor
        return object()  # Equal to none: it may have been changed.


def _tell_of_new_work(objects: Sequence[str], rates: Mapping[str, float], restored: Mapping[str, float]) -> None:
    """Warn of changes between the restore and the first loop that were undone, if the first start made no such ones."""
    differ = [name for name, value in restored.items() if rates.get(name, value) != value]
    if objects:
        _log.warning(
            "the program has changed %s after the restore and before its first loop. The run goes on in that loop, so "
            'this is undone%s. To change a run before it goes on, use Restoring(): hyperparameters="program", only=, '
            "leave_out= or init_from=",
            listed(objects),
            "".join(f": {name} is {restored[name]:g} again, not {rates[name]:g}" for name in differ),
        )
