"""Several processes write one checkpoint together.

The protocol: the chief asks for the parts. Every process answers with a list of what it has and waits for its plan. The
chief plans which process writes which items, sends each process its plan, writes its own part, and waits until all
others have answered. All messages go through the processes' common store, on the writing threads, so that training
does not wait. A process that cannot write its part answers with the error instead; the chief then has no checkpoint,
and its writer tries again as after an error of its own disk.

No deadlock is possible: the chief sends the plans also when planning has failed (each is then ``None``), and collects
all answers before it raises an error of its own. `PartMessages` end the wait for a process that no longer answers. A
kill of any process leaves an incomplete stage without a manifest, which the next chief sweeps.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from stepguard.disk import files
from stepguard.errors import NoBoundaryError, described
from stepguard.steps.common_store import StoreLostError
from stepguard.steps.part_messages import PartMessages
from stepguard.torch.checkpoint import unpickling
from stepguard.torch.checkpoint.files import process_file, write_file
from stepguard.words import logger

_log = logger(__name__)


def write_process(messages: PartMessages, directory: Path, state: Mapping[str, Any]) -> None:
    """Write the file of this process into the chief's ``directory``, and send its size and digest to the chief.

    Runs at a thread's edge: an error is sent to the chief, not raised.
    """
    try:
        name = process_file(messages.rank)
        _check_is_here(directory)
        size, digest = write_file(directory / name, state)
        _sync(directory / name)
        messages.answer("process", json.dumps([size, digest]).encode())
    except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
        answer_error(messages, "process", error)


def collect_processes(messages: PartMessages | None) -> dict[str, tuple[int, str]]:
    """Wait until the other processes have written their files; return sizes and digests by file name. Chief only.

    Raises:
        NonFiniteError, OSError, CheckpointError: as :func:`write_all`.
    """
    if messages is None:
        return {}
    answers = [json.loads(one) for one in messages.collect("process")]
    return {process_file(rank): (size, digest) for rank, (size, digest) in enumerate(answers, start=1)}


def write_all(
    messages: PartMessages | None, directory: Path, states: Mapping[str, Any], frozen: Mapping[str, Collection[str]]
) -> dict[str, tuple[int, str]]:
    """Have every process write its part into ``directory``; return sizes and digests by file name. Chief only.

    ``frozen`` has the names, in the states, of what gets a file of its own.

    Raises:
        NonFiniteError: the state of another process is not finite.
        OSError: a process could not write. All processes have then stopped writing.
        CheckpointError: a process has failed in another way, or no longer answers.
    """
    from stepguard.torch.checkpoint import sharded_files

    planner = sharded_files.SavePlanner(states, frozen)
    mine = planner.create_local_plan()
    if messages is None:
        (plan,), metadata = planner.create_global_plan([mine])
        written = sharded_files.write_parts(directory, 0, planner, plan)
    else:
        plan, metadata = _agreed_plan(messages, planner, mine)
        try:
            own = sharded_files.write_parts(directory, 0, planner, plan)
        finally:
            others = messages.collect("part")
        written = [*own, *(sharded_files.Part(*part) for one in others for part in unpickling.loads(one))]
    sharded_files.write_metadata(directory, metadata, written)
    return {part.name: (part.size, part.digest) for part in written}


def _agreed_plan(messages: PartMessages, planner: Any, mine: Any) -> tuple[Any, Any]:
    plans: list[Any] = []
    try:
        theirs = [unpickling.loads(one) for one in messages.collect("has")]
        plans, metadata = planner.create_global_plan([mine, *theirs])
    finally:
        # Also sent if there is no plan, because the others wait for one.
        messages.deal("writes", [pickle.dumps(plan) for plan in plans[1:] or [None] * messages.others])
    return plans[0], metadata


def write_mine(
    messages: PartMessages,
    rank: int,
    directory: Path,
    states: Callable[[], Mapping[str, Any]],
    frozen: Mapping[str, Collection[str]],
) -> None:
    """Write the part of this process into the chief's ``directory``. Not for the chief. ``frozen`` as above.

    Runs at a thread's edge: an error is sent to the chief, not raised.
    """
    from stepguard.torch.checkpoint import sharded_files

    asked = "has"
    try:
        planner = sharded_files.SavePlanner(states(), frozen)
        messages.answer("has", pickle.dumps(planner.create_local_plan()))
        asked = "part"
        plan = unpickling.loads(messages.receive("writes"))
        if plan is None:
            return
        _check_is_here(directory)
        written = sharded_files.write_parts(directory, rank, planner, plan)
        for part in written:
            _sync(directory / part.name)
        messages.answer("part", pickle.dumps([(one.results, one.name, one.size, one.digest) for one in written]))
    except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
        answer_error(messages, asked, error)


def _check_is_here(directory: Path) -> None:
    if not directory.is_dir():
        # An OSError, so that the chief tries again: a network file system may show the directory late.
        raise FileNotFoundError(
            errno.ENOENT, "the chief's directory is not here: all processes need the same logdir", str(directory)
        )


def _sync(path: Path) -> None:
    """Make a file durable. The chief cannot, because the file was written by this machine."""
    files.fsync_file(path)
    files.fsync_dir(path.parent)


def answer_error(messages: PartMessages, asked: str, error: Exception) -> None:
    """Send the chief an error in place of the answer that it waits for."""
    reason = str(error) if isinstance(error, NoBoundaryError) else described(error)
    _log.warning("the part of this process was not written (process %d): %s", os.getpid(), reason)
    try:
        messages.answer_error(asked, error)
    except StoreLostError:
        # The store has ended together with the process that hosts it, and a launcher is about to end this process too.
        _log.debug("the chief could not be told", exc_info=True)
