"""The engine of JAX programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import Beginning, Prepared, StepTrace
from stepguard.errors import CheckpointCorruptError
from stepguard.jax.checkpoint.restore import first_values, read_state
from stepguard.jax.checkpoint.snapshot import JaxSnapshot, take
from stepguard.jax.digests import bytes_of, parts_of
from stepguard.jax.distributed.member import JaxMember, collect_parts
from stepguard.jax.distributed.world import shared_store, world
from stepguard.jax.session import STREAMS, Session, changed_leaves, leaves_of
from stepguard.options import Restoring
from stepguard.orbax_files.runs import restore_newest_of_orbax, step_of
from stepguard.orbax_files.taken import ENGINE, process_file, read_process, write_part, write_process, write_tree
from stepguard.saving.restoring import restore_newest
from stepguard.steps.event_file import EventFile, WriterEvents
from stepguard.steps.numbers import as_numbers
from stepguard.steps.part_messages import PartMessages
from stepguard.steps.peers_engine import PeersEngine
from stepguard.steps.process_state import describe_positions
from stepguard.steps.step_digests import StepDigests
from stepguard.store import Checkpoint, CheckpointStore, Recovery
from stepguard.words import logger

_log = logger(__name__)

_UNCHANGING = (jax.Array, bool, int, float, str, bytes)


class JaxEngine(PeersEngine[Session]):
    """The engine over the value that a program trains. For threads see :class:`stepguard.engine.Engine`.

    ``store`` is None without a logdir. Processes other than the chief read from it, and do not commit.
    """

    def __init__(
        self,
        *,
        store: CheckpointStore | None,
        restoring: Restoring,
        events: EventFile | WriterEvents | None,
        basename: str,
        summaries: Callable[[Any], Mapping[str, Any]] | None,
        init_fn: Callable[[Any], Any] | None,
        coord: Coordinator,
        stop_grace_secs: float,
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
        self._store = store
        self._restoring = restoring
        self._summaries = summaries
        self._init_fn = init_fn
        self._coord = coord

    # --- the session ---

    def prepare(self, state: Any = None, meets_every: int | None = None) -> Prepared[Session]:
        """Prepare a session from the newest good checkpoint; without one, from ``state``.

        ``meets_every``: see `PeersEngine.prepare_session`.
        """
        prepared = self.prepare_session(
            lambda gate: Session(state, self._coord, self.write_summary, gate=gate, processes=self.peers.size),
            meets_every,
        )
        prepared.session.note_start()
        return prepared

    def initialise(self, session: Session) -> None:
        """Begin with the program's own state."""
        if self._init_fn is not None:
            session.state = self._init_fn(session.state)
        session.state = first_values(session.state, self._restoring)

    def new_member(self, session: Session) -> JaxMember:
        """This process's part of checkpoints."""
        root = None if self._store is None else self._store.root
        return JaxMember(self._coord, session, root, self.peers.rank, lambda: self.value_watch is not None)

    def restore(self, session: Session, checkpoint: Checkpoint, *, in_run: bool = False) -> None:
        """Replace the state of the session."""
        if in_run:
            self._return_to(session, checkpoint.path)
            return
        self._load(session, checkpoint.path, rank=0)
        if self._restoring == Restoring() and not self.peers.has_any:
            restored = leaves_of(session.state)
            session.put_back_with(functools.partial(self._put_back, session, checkpoint.path, restored))

    def _put_back(
        self,
        session: Session,
        path: Path,
        restored: Mapping[str, Any],
        with_streams: bool,  # noqa: ARG002
    ) -> None:
        """Reset the state to that with which the session was restored, unless it still is that."""
        found = leaves_of(session.state)
        changed = changed_leaves(restored, found)
        if changed or len(found) != len(restored) or not all(isinstance(one, _UNCHANGING) for one in found.values()):
            self._return_to(session, path)
        session.process_state.own.tell_of_taken(changed, {})

    def _return_to(self, session: Session, path: Path) -> None:
        """Reset the state and the step. Random streams and data positions are kept."""
        process = _process(path, 0)
        session.state = read_state(path, session.state, Restoring())
        session.global_step = process["global_step"]

    def _load(self, session: Session, path: Path, rank: int) -> None:
        chief, own = _process(path, 0), read_process(path, rank)
        state = read_state(path, session.state, self._restoring)
        # A process that the earlier run did not have begins with the random streams that the program has seeded.
        process = {**chief, "random": STREAMS.capture(), "place": None} if own is None else own
        session.state = state
        session.restore_process_state(process, chief["global_step"])
        _log.info("going on at step %d: %s", session.global_step, describe_positions(process))

    def _load_orbax(self, session: Session, path: Path, step: int) -> None:
        """Continue a run of Orbax's CheckpointManager, which has kept no position in the data."""
        session.state = read_state(path, session.state, self._restoring)
        session.global_step = step
        _log.warning(
            "going on at step %d from %s, which Orbax has written: it holds no position in the data and no random "
            "streams, so a new epoch begins",
            step,
            path,
        )

    def go_on(self, session: Session) -> tuple[Recovery | None, bool]:
        """The result of this process's own search, and whether the session was restored (perhaps as the chief said)."""
        found: list[Recovery] = []
        store = self._store

        def restore_own() -> str | None:
            if store is None:
                return None
            # A program that went back to Orbax for a time goes on where Orbax has left it.
            newest = max((one.step or 0 for one in store.candidates()), default=-1)
            of_orbax = None
            if self._restoring.step is None:
                of_orbax = restore_newest_of_orbax(store.root, newest, functools.partial(self._load_orbax, session))
            if of_orbax is not None:
                found.append(Recovery(of_orbax))
            else:
                found.append(restore_newest(store, functools.partial(self.restore, session), self._restoring))
            return None if found[0].checkpoint is None else found[0].checkpoint.name

        def restore_named(name: str) -> None:
            if store is None:
                return
            path, step = store.root / name, step_of(name)
            if not path.is_dir():
                raise FileNotFoundError(
                    f"{path}: the chief has restored this checkpoint, and it is not here: all need the same logdir"
                )
            if step is not None:
                self._load_orbax(session, path, step)
            else:
                self._load(session, path, self.peers.rank)

        name = self.peers.restored(restore_own, restore_named)
        return next(iter(found), None), name is not None

    # --- steps ---

    def trace_steps(self, session: Session, trace: StepTrace) -> Beginning:
        """The session tells ``trace`` the numbers that it summarises, and the digests that ``trace`` wants."""
        digests = None
        if trace.wants_digests:
            digests = StepDigests(trace, STREAMS, state=lambda: parts_of(session.state), as_bytes=bytes_of)
        return session.trace_with(trace, digests)

    # --- checkpoints ---

    def snapshot(self, session: Session) -> JaxSnapshot:
        """Refer to the arrays, or copy those that the next step would donate."""
        session.donations.look_again()
        process = {"global_step": session.global_step, **session.process_state.capture()}
        return take(
            session.state, session.global_step, process, session.donations, session.memory, moment=session.moment
        )

    def non_finite(self, snapshot: Any) -> Sequence[str]:
        """The names of leaves with NaN or infinity, and of plain numbers that are NaN."""
        return list(snapshot.non_finite())

    def write(self, snapshot: Any, stage: Path, name: str) -> Mapping[str, tuple[int, str]]:
        """Write a directory that Orbax reads; each of several processes writes its shards into it."""
        snapshot.finish()
        directory = stage / name

        def write_own(_messages: PartMessages | None) -> dict[str, tuple[int, str]]:
            return {**write_part(directory, 0, snapshot), **write_process(directory, 0, snapshot.process)}

        root = None if self._store is None else self._store.root
        parts = self.write_jointly(directory, root, snapshot.moment, write_own, collect_parts)
        tree = write_tree(directory, snapshot, self.peers.size)
        return {f"{name}/{file}": digest for file, digest in {**parts, **tree}.items()}

    # --- summaries ---

    def summarise(self, session: Session) -> None:
        """Evaluate the program's summary function between two steps, without moving the random states.

        It is not called after the last step of a loop, because the state belongs to the program then.
        """
        if self._summaries is None or self._events is None:
            return
        with session.boundary.hold("a summary"), STREAMS.preserved():
            if session.boundary.is_resting:
                return
            values, step = as_numbers(self._summaries(session.state), "summaries"), session.global_step
        _log.info("recording summary at step %d", step)
        self.write_summary(values, step)


def _process(path: Path, rank: int) -> dict[str, Any]:
    process = read_process(path, rank)
    if process is None:
        raise CheckpointCorruptError(f"{path}: expected the file {process_file(rank)}, found none", path=path)
    return process
