"""PyTorch programs, as the core sees them."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from stepguard import files
from stepguard.coordination.coordinator import Coordinator
from stepguard.engine import Prepared, ValueWatch
from stepguard.steps.chief import Chief
from stepguard.steps.common_store import CommonStore
from stepguard.steps.exchange import Exchange
from stepguard.steps.gate import Gate
from stepguard.steps.worker import Worker
from stepguard.store import Checkpoint, Recovery
from stepguard.torch.checkpoint.files import SUFFIX, process_file, write_file
from stepguard.torch.checkpoint.restore import ENGINE, Restorer
from stepguard.torch.checkpoint.sharded_tensors import is_sharded, skeleton
from stepguard.torch.checkpoint.snapshot import CopyStreams, HostMemory, TorchSnapshot, nbytes, non_finite
from stepguard.torch.checkpoint.state import Component
from stepguard.torch.distributed.joint_write import collect_processes, write_all
from stepguard.torch.distributed.member import TorchMember
from stepguard.torch.distributed.world import shared_store, world
from stepguard.torch.events import TorchEvents, as_numbers, check_values
from stepguard.torch.random_states import STREAMS
from stepguard.torch.session import Session

_log = logging.getLogger(__name__)


class TorchEngine:
    """The engine over the objects that a program saves. Threads: see :class:`stepguard.engine.Engine`."""

    storage_error_types: tuple[type[BaseException], ...] = ()

    def __init__(
        self,
        components: Sequence[Component],
        *,
        root: Path | None,
        restorer: Restorer | None,
        events: TorchEvents | None,
        basename: str,
        summaries: Callable[[], Mapping[str, Any]] | None,
        init_fn: Callable[[], object] | None,
        coord: Coordinator,
        stop_grace_secs: float,
    ) -> None:
        self.name = ENGINE
        self._components = components
        self._root = root
        self._restorer = restorer
        self._events = events
        self._basename = basename
        self._summaries = summaries
        self._init_fn = init_fn
        self._coord = coord
        self._stop_grace_secs = stop_grace_secs
        self._rank, self._processes = world()
        self.can_return = self._processes == 1
        self._shared = shared_store() if self._processes > 1 else None
        self._sessions = 0
        self._peers: Chief | Worker | None = None
        self._member: TorchMember | None = None
        self._is_met = False
        # With the snapshots in them, as long as somebody has these.
        self._memories: list[tuple[HostMemory, weakref.ref[CopyStreams]]] = []
        self._watch: ValueWatch | None = None

    # --- the session ---

    def prepare(self, meets_every: int | None = None) -> Prepared[Session]:
        """A session that goes on from the newest good checkpoint; without one, from the model as it is.

        Several processes take their states after each ``meets_every`` steps, so that the chief can save exactly there.
        """
        gate = None if self._shared is None else Gate()
        optimizers = {one.name: one.holder for one in self._components if isinstance(one.holder, torch.optim.Optimizer)}
        session = Session(self._coord, self.write_summary, gate=gate, processes=self._processes, optimizers=optimizers)
        self._sessions += 1
        if self._shared is not None and gate is not None:
            self._meet_peers(session, self._shared, gate)
        try:
            recovered, is_restored = self._go_on(session)
            if not is_restored and self._init_fn is not None:
                self._init_fn()
        except BaseException:
            self.close(session)
            raise
        self._is_met = meets_every is not None
        if gate is not None and meets_every is not None and self._rank > 0:
            gate.meet_every(meets_every - session.global_step % meets_every, meets_every)
        session.hold_interrupts()
        return Prepared(session, recovered)

    def restore(self, session: Session, checkpoint: Checkpoint, *, in_run: bool = False) -> None:
        """Load the state into the objects of the program."""
        if self._restorer is None:
            raise AssertionError("a session without a logdir has no checkpoint to restore")
        if not in_run:
            self._restorer.load(checkpoint.path, session)
            session.put_back_with(functools.partial(self._put_back, self._restorer, checkpoint.path, session))
            return
        _synchronize()
        self._restorer.return_to(checkpoint.path, session)
        # The training runs on streams of its own threads.
        _synchronize()

    def _put_back(self, restorer: Restorer, path: Path, session: Session) -> None:
        """Once more what the session was restored with, before its first step."""
        restorer.return_to(path, session)
        session.put_gradients_back()

    def _go_on(self, session: Session) -> tuple[Recovery | None, bool]:
        """What the search of this process has found, and whether the session was restored: also by the chief's word."""
        if isinstance(self._peers, Worker):
            name = self._peers.restored()
            if name is not None and self._restorer is not None:
                self._restorer.restore_named(session, name, self._rank)
            return None, name is not None
        restore = functools.partial(self.restore, session)
        recovered = None if self._restorer is None else self._restorer.restore_newest(restore)
        good = None if recovered is None else recovered.checkpoint
        if self._peers is not None:
            self._peers.restored(None if good is None else good.name)
        return recovered, good is not None

    def _meet_peers(self, session: Session, shared: CommonStore, gate: Gate) -> None:
        store = shared.below(f"session/{self._sessions}")
        member = TorchMember(self._coord, session, self._components, HostMemory(), self._root)
        grace_secs = self._stop_grace_secs
        if self._rank == 0:
            self._peers = Chief(store, self._processes, gate, member, grace_secs=grace_secs)
        else:
            self._peers = Worker(store, self._rank, self._processes, gate, member, grace_secs=grace_secs)
        self._member = member
        self._peers.start()

    def is_open(self, session: Session) -> bool:
        """Whether the session can still run."""
        return session.is_open

    def close(self, session: Session) -> None:
        """Close the session."""
        session.unwatch()
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.close(self._stop_grace_secs)
        session.close()

    # --- steps ---

    def step(self, session: Session) -> int:
        """The steps done, without one that was left by an error: once the error has come to the coordinator."""
        return session.global_step - self._is_cut_short(session)

    def step_name(self) -> str:
        """The name of the step-rate curve's counter, the same as TensorFlow's."""
        return "global_step"

    def total_steps(self, session: Session) -> int | None:
        """What ``steps`` was given as ``max_steps``."""
        return session.total_steps

    def watch(self, session: Session, before_close: Callable[[], None]) -> None:
        """A session marks its steps from the beginning; this only tells it whom to call."""
        session.watch(before_close)

    def watch_values(self, session: Session, watch: ValueWatch) -> None:
        """Show it what is summarised; a step returns no numbers."""
        self._watch = watch
        if self._member is not None:
            self._member.watch = watch
        session.watch_values(watch)

    def stop_at_boundary(self, session: Session, main_thread_was_told: Callable[[], bool]) -> None:
        """``steps`` ends at the next boundary, and ``step`` raises there."""
        if self._peers is None:
            session.boundary.stop(main_thread_was_told)
        # Else the request that came with this one is passed on, and all of them stop after the same step.

    def call_after_steps(self, session: Session, steps: int, callback: Callable[[], int]) -> None:
        """Count the steps of the session."""
        peers = self._peers
        if isinstance(peers, Chief) and self._is_met:
            callback = functools.partial(peers.at_known_step, callback)
        elif peers is not None:
            # It meets the others, and they may need the next step of this process to come there.
            callback = _InBackground(session, callback)
        session.boundary.call_after_steps(steps, callback)

    def progress(self, session: Session) -> object:
        """The number of steps done in this session, as in :meth:`step`, and of epochs whose ends are done."""
        return session.boundary.steps - self._is_cut_short(session), session.process_state.epochs_done

    def is_resting(self, session: Session) -> bool:
        """Whether no loop over ``steps`` runs."""
        return session.boundary.is_resting

    def is_evaluating(self, session: Session) -> bool:
        """Inside ``sess.evaluating()``."""
        return session.is_evaluating

    def is_alone(self, session: Session) -> bool:  # noqa: ARG002 - it is so for the process
        """Whether ``torch.distributed`` has one process."""
        return self._processes == 1

    def call_at_rest(self, session: Session, keep: Callable[[bool], None]) -> None:
        """At the boundary at which the session rests."""
        session.boundary.call_at_rest(keep)

    def defer(self, session: Session, callback: Callable[[], None]) -> bool:
        """To the end of a step with an evaluation in it."""
        return session.defer(callback)

    def _is_cut_short(self, session: Session) -> bool:
        """Whether the last step that the session counts was left by an error, or by a second Ctrl-C.

        One that was left by ``break``, with an error after its loop, looks the same, and is not saved either.
        """
        return session.is_left and (self._coord.failed or session.boundary.is_torn)

    @contextmanager
    def at_boundary(self, session: Session, what: str, patience_secs: float | None = None) -> Iterator[None]:
        """Hold the steps back: of all processes after the same step, where there are several."""
        session.finish_step()
        # Before the others are asked to come to it.
        session.boundary.check_whole(what)
        with ExitStack() as stack:
            if isinstance(self._peers, Chief):
                stack.enter_context(self._peers.meeting(what))
            stack.enter_context(session.boundary.hold(what, patience_secs))
            yield

    # --- checkpoints ---

    def snapshot(self, session: Session) -> TorchSnapshot:
        """Copy the state into host memory, which is used again when nobody has the snapshot in it any more."""
        memory = self._free_memory()
        copies = CopyStreams(session.training_streams)
        with torch.no_grad():
            states = {one.name: memory.copy(one.name, one.state(), copies) for one in self._components}
            process = memory.copy("process", session.process_state.capture(), copies)
            copies.close()
        self._memories.append((memory, weakref.ref(copies)))
        return TorchSnapshot(session.global_step, states, process, nbytes(states), copies)

    def _free_memory(self) -> HostMemory:
        """Memory in which no snapshot is: there is a second one only where a loop ends while another is written."""
        free = [memory for memory, copies in self._memories if copies() is None]
        self._memories = [(memory, copies) for memory, copies in self._memories if copies() is not None]
        return free[0] if free else HostMemory()

    def non_finite(self, snapshot: Any) -> Sequence[str]:
        """Tensors with NaN or infinity, and plain numbers that are NaN, by their places."""
        snapshot.copies.finish()
        return [place for name, state in snapshot.states.items() for place in non_finite(name, state)]

    def checkpoint_name(self, step: int | None) -> str:
        """``model.ckpt-1200``."""
        return f"{self._basename}-{step}"

    def write(self, snapshot: Any, stage: Path, name: str) -> Mapping[str, tuple[int, str]]:
        """A directory with one file for each object, which ``torch.load(weights_only=True)`` reads.

        Objects that are sharded lie in the files of ``torch.distributed.checkpoint``, to which every process writes.
        """
        snapshot.copies.finish()
        directory = stage / name
        files.make_dir(directory)
        exchange = None
        if isinstance(self._peers, Chief) and self._root is not None:
            exchange = self._peers.exchange(directory.relative_to(self._root).as_posix())
        try:
            digests = self._write_own(snapshot, directory, exchange)
        except BaseException:
            # The others must not write on to what the next try has; what they say is later than this error.
            with contextlib.suppress(Exception):
                collect_processes(exchange)
            raise
        others = collect_processes(exchange)
        return {f"{name}/{file}": digest for file, digest in {**digests, **others}.items()}

    def _write_own(self, snapshot: Any, directory: Path, exchange: Exchange | None) -> dict[str, tuple[int, str]]:
        sharded = {part: state for part, state in snapshot.states.items() if is_sharded(state)}
        written = {f"{part}{SUFFIX}": state for part, state in snapshot.states.items() if part not in sharded}
        process = written[process_file(0)] = {"global_step": snapshot.step, **snapshot.process}
        digests = {}
        if sharded:
            # The sharded format loses which keys were numbers, and what was empty: it is kept here.
            process["sharded"] = {part: skeleton(part, state) for part, state in sharded.items()}
            digests = write_all(exchange, directory, sharded)
        return digests | {file: write_file(directory / file, state) for file, state in written.items()}

    def committed(self, kept: Sequence[tuple[str, float]]) -> None:  # noqa: ARG002 - PyTorch keeps no list of its own
        """The other processes need not keep their parts any longer."""
        if isinstance(self._peers, Chief):
            self._peers.settled()

    # --- summaries ---

    def summarise(self, session: Session) -> None:
        """Evaluate the program's summary function between two steps, without moving the random states. Not after the
        last step of a loop: the program may be using the model itself, in another mode.
        """
        if self._summaries is None or self._events is None:
            return
        with session.boundary.hold("a summary"), STREAMS.preserved(), torch.no_grad():
            if session.boundary.is_resting:
                return
            values, step = self._summaries(), session.global_step
        _log.info("recording summary at step %d", step)
        self.write_summary(values, step, where="summaries")

    def write_summary(self, values: Mapping[str, Any], step: int, *, where: str = "summary") -> None:
        """Values that the program has computed itself, and given to ``where``. Any thread.

        Raises:
            TypeError: one of them is no number, or they are no dictionary.
        """
        check_values(values, where)
        if self._watch is None and self._events is None:
            return  # Nobody looks: what is on a GPU is not waited for.
        values = as_numbers(values, where)
        if self._events is not None:
            self._events.summary(values, step)
        if self._watch is not None:
            self._watch.look(values, step)


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


class _InBackground:
    """Calls ``callback`` in a thread of its own, and looks at each step whether it is done."""

    def __init__(self, session: Session, callback: Callable[[], int]) -> None:
        self._session = session
        self._callback = callback
        self._thread: threading.Thread | None = None
        self._next_at = 0

    def __call__(self) -> int:
        steps = self._session.boundary.steps
        if self._thread is None:
            self._thread = threading.Thread(target=self._call, args=(steps,), name="stepguard-save", daemon=True)
            self._thread.start()
            return 1
        if self._thread.is_alive():
            return 1
        self._thread = None
        return max(1, self._next_at - steps)

    def _call(self, steps: int) -> None:
        self._next_at = steps + self._callback()
