"""One process of a distributed JAX training, as the rendezvous sees it: its shards of the state, and writing them.

Which process writes which shard follows from the shardings, so nothing needs to be agreed on: of each shard the first
replica is written, by the process that has its device. The chief asks for the parts, and every process answers with the
sizes and digests of its files, or with its error. The chief waits for all answers before it commits, or tries again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from stepguard.coordination.coordinator import Coordinator
from stepguard.disk import files
from stepguard.errors import NonFiniteError, described
from stepguard.jax.checkpoint.snapshot import JaxSnapshot, take
from stepguard.jax.session import Session
from stepguard.orbax_files.taken import write_part, write_process
from stepguard.steps.common_store import StoreLostError
from stepguard.steps.gate import Moment
from stepguard.steps.member import SessionMember
from stepguard.steps.part_messages import PartMessages
from stepguard.words import listed, logger

_log = logger(__name__)

_PART = "part"
_JAX = os.path.join(os.path.dirname(jax.__file__), "")


@dataclass(frozen=True, slots=True)
class JaxPart:
    """The shards of one process, its random streams and its positions in the data, at one moment."""

    moment: Moment
    steps: int
    snapshot: JaxSnapshot


class JaxMember(SessionMember):
    """Takes and writes the part of a checkpoint that belongs to this process.

    Without ``root`` the process has no logdir. ``is_watched`` says whether the values that are saved must be finite.
    """

    def __init__(
        self, coord: Coordinator, session: Session, root: Path | None, rank: int, is_watched: Callable[[], bool]
    ) -> None:
        super().__init__(coord, session)
        self._jax_session = session
        self._root = root
        self._rank = rank
        self._is_watched = is_watched

    def is_collective(self, file: str) -> bool:
        """Collective operations run in the background; the host waits in JAX's own modules for their results."""
        return file.startswith(_JAX)

    def take_part(self) -> JaxPart:
        """Take this process's shards, random streams and positions in the data."""
        session = self._jax_session
        with session.boundary.hold("a checkpoint"):
            session.donations.look_again()
            process = {"global_step": session.global_step, **session.process_state.capture()}
            taken = take(session.state, session.global_step, process, session.donations, session.memory, self._rank)
            return JaxPart(self.moment(), self.steps_done(), taken)

    def write_part(self, messages: PartMessages, place: str, part: Callable[[], JaxPart]) -> None:
        """Write the files of this process into ``place`` below the logdir, and send their digests to the chief."""
        try:
            written = self._write((self._root or Path()) / place, part().snapshot)
            messages.answer(_PART, json.dumps(written).encode())
        except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
            _log.warning("the part of process %d was not written: %s", self._rank, described(error))
            try:
                messages.answer_error(_PART, error)
            except StoreLostError:
                # The store has ended with the process that hosts it, and a launcher is about to end this process too.
                _log.debug("the chief could not be told", exc_info=True)

    def _write(self, directory: Path, taken: JaxSnapshot) -> Mapping[str, Any]:
        if not directory.is_dir():
            # An OSError, so that the chief tries again: a network file system may show the directory late.
            raise FileNotFoundError(
                errno.ENOENT, "the chief's directory is not here: all processes need the same logdir", str(directory)
            )
        names = taken.non_finite() if self._is_watched() else []
        if names:
            raise NonFiniteError(f"the state to be saved is not finite: {listed(names)}", step=None, names=names)
        taken.finish()
        written = {
            **write_part(directory, self._rank, taken),
            **write_process(directory, self._rank, taken.process),
        }
        # The chief cannot make them durable, because another machine may have written them.
        for name in written:
            files.fsync_file(directory / name)
        for folder in {(directory / name).parent for name in written}:
            files.fsync_dir(folder)
        return written


def collect_parts(messages: PartMessages | None) -> dict[str, tuple[int, str]]:
    """Wait until the other processes have written their files; return sizes and digests by file name. Chief only.

    Raises:
        NonFiniteError: the state of another process is not finite.
        OSError: a process could not write. All processes have then stopped writing.
        CheckpointError: a process has failed in another way, or no longer answers.
    """
    answers = [] if messages is None else [json.loads(one) for one in messages.collect(_PART)]
    return {name: (size, digest) for one in answers for name, (size, digest) in one.items()}
