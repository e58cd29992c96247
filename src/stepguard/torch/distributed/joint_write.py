"""How several processes write one checkpoint: each its part, and none of them knows more of the others than it is told.

The chief asks for the parts, and every process tells it what it has; from that the chief plans who writes what, tells
them, and waits until all have written. A process that cannot write its part says so, and then there is no checkpoint:
the chief's writer tries again, as it does when its own disk fails. All of this goes through the key-value store of
``torch.distributed``, in the threads that write.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepguard import files
from stepguard.errors import CheckpointError, NonFiniteError, described
from stepguard.torch.checkpoint import unpickling

_log = logging.getLogger(__name__)

_LOOK_SECS = 0.005
# In place of the number of an error of the operating system.
_NON_FINITE = -1


class Exchange:
    """What is said about one try to write one checkpoint, in a part of the store that belongs to it.

    ``check_alive`` is called again and again while an answer is awaited, and raises when there will be none.
    """

    def __init__(self, store: Any, rank: int, size: int, check_alive: Callable[[str], None]) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._check_alive = check_alive

    # --- the chief ---

    def collect(self, what: str) -> list[Any]:
        """What the others say, in the order of their ranks, once all have said it.

        Raises:
            NonFiniteError: the state of one of them is not finite.
            OSError: one of them could not write.
            CheckpointError: one of them has failed in another way, or will not answer any more.
        """
        # All of them first: who has failed may not be the last that still writes to the directory.
        answers = [unpickling.loads(self._await(f"{what}/{rank}")) for rank in range(1, self._size)]
        for rank, (code, answer) in enumerate(answers, start=1):
            if code is None:
                continue
            if code == _NON_FINITE:
                text, step, names = answer
                raise NonFiniteError(f"rank {rank}: {text}", step=step, names=names)
            message = f"rank {rank} could not write its part: {answer}"
            raise OSError(code, message) if code else CheckpointError(message)
        return [answer for _, answer in answers]

    def deal(self, what: str, content: Sequence[Any]) -> None:
        """Tell each of the others its own, and ``None`` to those for whom there is nothing."""
        for rank in range(1, self._size):
            one = content[rank - 1] if rank <= len(content) else None
            self._store.set(f"{what}/{rank}", pickle.dumps(one))

    # --- the others ---

    def answer(self, what: str, content: Any, error_code: int | None = None) -> None:
        """Tell the chief; with an ``error_code`` of an error: its text, or what a NonFiniteError is made of."""
        self._store.set(f"{what}/{self._rank}", pickle.dumps((error_code, content)))

    def receive(self, what: str) -> Any:
        """What the chief says to this process."""
        return unpickling.loads(self._await(f"{what}/{self._rank}"))

    # --- both ---

    def _await(self, key: str) -> bytes:
        while not self._store.check([key]):
            self._check_alive(key)
            time.sleep(_LOOK_SECS)
        content = bytes(self._store.get(key))
        # The store is in the memory of one process, for as long as the training lasts.
        self._store.delete_key(key)
        return content


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
        written = [own, *(sharded_files.Part(*one) for one in others)]
    sharded_files.write_metadata(directory, metadata, written)
    return {part.name: (part.size, part.digest) for part in written}


def _agreed_plan(exchange: Exchange, planner: Any, mine: Any) -> tuple[Any, Any]:
    plans: list[Any] = []
    try:
        plans, metadata = planner.create_global_plan([mine, *exchange.collect("has")])
    finally:
        # Also when there is none: they wait for it.
        exchange.deal("writes", plans[1:])
    return plans[0], metadata


def write_mine(exchange: Exchange, rank: int, directory: Path, states: Callable[[], Mapping[str, Any]]) -> None:
    """Write the part of this process into the chief's ``directory``. Not the chief; a thread's edge."""
    from stepguard.torch.checkpoint import sharded_files

    asked = "has"
    try:
        planner = sharded_files.SavePlanner(states())
        exchange.answer("has", planner.create_local_plan())
        asked = "part"
        plan = exchange.receive("writes")
        if plan is None:
            return
        if not directory.is_dir():
            # Its own errors are those of a disk, and tried again: a network file system may be behind.
            raise FileNotFoundError(
                errno.ENOENT, "the chief's directory is not here: all processes need the same logdir", str(directory)
            )
        part = sharded_files.write_part(directory, rank, planner, plan)
        # Of this machine, and so not the chief's to sync.
        files.fsync_file(directory / part.name)
        files.fsync_dir(directory)
        exchange.answer("part", (part.results, part.name, part.size, part.digest))
    except OSError as error:
        _answer_error(exchange, asked, error, error.errno or errno.EIO, described(error))
    except NonFiniteError as error:
        _answer_error(exchange, asked, error, _NON_FINITE, (str(error), error.step, error.names))
    except Exception as error:  # noqa: BLE001 - a thread's edge: the chief raises it
        _answer_error(exchange, asked, error, 0, described(error))


def _answer_error(exchange: Exchange, asked: str, error: Exception, code: int, content: Any) -> None:
    _log.warning("the part of this process was not written (process %d): %s", os.getpid(), described(error))
    try:
        exchange.answer(asked, content, code)
    except RuntimeError:
        # The store has ended with the process that has it, and torchrun is about to end this one.
        _log.debug("the chief could not be told", exc_info=True)
