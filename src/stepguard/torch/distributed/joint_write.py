"""How several processes write one checkpoint: each its part, and none of them knows more of the others than it is told.

The chief asks for the parts, and every process tells it what it has; from that the chief plans who writes what, tells
them, and waits until all have written. A process that cannot write its part says so, and then there is no checkpoint:
the chief's writer tries again, as it does when its own disk fails. All of this goes through the store
that the processes have in common, in the threads that write.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepguard import files
from stepguard.errors import described
from stepguard.steps.common_store import StoreLostError
from stepguard.steps.exchange import Exchange
from stepguard.torch.checkpoint import unpickling
from stepguard.torch.checkpoint.files import process_file, write_file

_log = logging.getLogger(__name__)


def write_process(exchange: Exchange, directory: Path, state: Mapping[str, Any]) -> None:
    """Write the file of this process into the chief's ``directory``; size and digest travel. A thread's edge."""
    try:
        name = process_file(exchange.rank)
        _check_is_here(directory)
        size, digest = write_file(directory / name, state)
        _sync(directory / name)
        exchange.answer("process", json.dumps([size, digest]).encode())
    except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
        answer_error(exchange, "process", error)


def collect_processes(exchange: Exchange | None) -> dict[str, tuple[int, str]]:
    """Sizes and digests of the files of the other processes, by name, once all are written. The chief.

    Raises:
        NonFiniteError, OSError, CheckpointError: as :func:`write_all`.
    """
    if exchange is None:
        return {}
    answers = [json.loads(one) for one in exchange.collect("process")]
    return {process_file(rank): (size, digest) for rank, (size, digest) in enumerate(answers, start=1)}


def write_all(exchange: Exchange | None, directory: Path, states: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Have every process write its part into ``directory``; sizes and digests of the files, by name. The chief.

    Raises:
        NonFiniteError: the state of one of the others is not finite.
        OSError: one of the processes could not write. All of them have then stopped writing.
        CheckpointError: one of them has failed in another way, or will not answer any more.
    """
    from stepguard.torch.checkpoint import sharded_files

    planner = sharded_files.SavePlanner(states)
    mine = planner.create_local_plan()
    if exchange is None:
        (plan,), metadata = planner.create_global_plan([mine])
        written = [sharded_files.write_part(directory, 0, planner, plan)]
    else:
        plan, metadata = _agreed_plan(exchange, planner, mine)
        try:
            own = sharded_files.write_part(directory, 0, planner, plan)
        finally:
            others = exchange.collect("part")
        written = [own, *(sharded_files.Part(*unpickling.loads(one)) for one in others)]
    sharded_files.write_metadata(directory, metadata, written)
    return {part.name: (part.size, part.digest) for part in written}


def _agreed_plan(exchange: Exchange, planner: Any, mine: Any) -> tuple[Any, Any]:
    plans: list[Any] = []
    try:
        theirs = [unpickling.loads(one) for one in exchange.collect("has")]
        plans, metadata = planner.create_global_plan([mine, *theirs])
    finally:
        # Also when there is none: they wait for it.
        exchange.deal("writes", [pickle.dumps(plan) for plan in plans[1:] or [None] * exchange.others])
    return plans[0], metadata


def write_mine(exchange: Exchange, rank: int, directory: Path, states: Callable[[], Mapping[str, Any]]) -> None:
    """Write the part of this process into the chief's ``directory``. Not the chief; a thread's edge."""
    from stepguard.torch.checkpoint import sharded_files

    asked = "has"
    try:
        planner = sharded_files.SavePlanner(states())
        exchange.answer("has", pickle.dumps(planner.create_local_plan()))
        asked = "part"
        plan = unpickling.loads(exchange.receive("writes"))
        if plan is None:
            return
        _check_is_here(directory)
        part = sharded_files.write_part(directory, rank, planner, plan)
        _sync(directory / part.name)
        exchange.answer("part", pickle.dumps((part.results, part.name, part.size, part.digest)))
    except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
        answer_error(exchange, asked, error)


def _check_is_here(directory: Path) -> None:
    if not directory.is_dir():
        # Its own errors are those of a disk, and tried again: a network file system may be behind.
        raise FileNotFoundError(
            errno.ENOENT, "the chief's directory is not here: all processes need the same logdir", str(directory)
        )


def _sync(path: Path) -> None:
    """Of this machine, and so not the chief's to sync."""
    files.fsync_file(path)
    files.fsync_dir(path.parent)


def answer_error(exchange: Exchange, asked: str, error: Exception) -> None:
    """Tell the chief why there is no answer to what it has asked."""
    _log.warning("the part of this process was not written (process %d): %s", os.getpid(), described(error))
    try:
        exchange.answer_error(asked, error)
    except StoreLostError:
        # The store has ended with the process that has it, and a launcher is about to end this one.
        _log.debug("the chief could not be told", exc_info=True)
