"""What the processes tell each other about one try to write one checkpoint, in the threads that write.

The others answer the chief's questions, and the chief deals to each what is for it. Each waits for the other alone, and
asks meanwhile whether it still can come: so a process that ends in the middle ends the exchange, and the checkpoint.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Sequence

from stepguard.errors import CheckpointError, NonFiniteError, described
from stepguard.steps.common_store import CommonStore

_LOOK_SECS = 0.005
# In place of the number of an error of the operating system.
_NON_FINITE = -1


class Exchange:
    """One try, in a part of the store that belongs to it.

    ``check_alive`` is called again and again while an answer is awaited, and raises when there will be none.
    """

    def __init__(self, store: CommonStore, rank: int, size: int, check_alive: Callable[[str], None]) -> None:
        self.rank = rank
        self._store = store
        self._size = size
        self._check_alive = check_alive

    @property
    def others(self) -> int:
        """How many processes there are besides the chief."""
        return self._size - 1

    # --- the chief ---

    def collect(self, what: str) -> list[bytes]:
        """What the others say, in the order of their ranks, once all have said it.

        Raises:
            NonFiniteError: the state of one of them is not finite.
            OSError: one of them could not write.
            CheckpointError: one of them has failed in another way, or will not answer any more.
        """
        # All of them first: who has failed may not be the last that still writes to the directory.
        answers = [self._await(f"{what}/{rank}") for rank in range(1, self._size)]
        return [_content_of(answer, rank) for rank, answer in enumerate(answers, start=1)]

    def deal(self, what: str, content: Sequence[bytes]) -> None:
        """Tell each of the others its own."""
        for rank, one in enumerate(content, start=1):
            self._store.set(f"{what}/{rank}", one)

    # --- the others ---

    def answer(self, what: str, content: bytes) -> None:
        """Tell the chief."""
        self._answer(what, [], content)

    def answer_error(self, what: str, error: Exception) -> None:
        """Tell the chief why there is no such thing."""
        if isinstance(error, NonFiniteError):
            self._answer(what, [_NON_FINITE, str(error), error.step, error.names])
        elif isinstance(error, OSError):
            self._answer(what, [error.errno or errno.EIO, described(error)])
        else:
            self._answer(what, [0, described(error)])

    def receive(self, what: str) -> bytes:
        """What the chief says to this process."""
        return self._await(f"{what}/{self.rank}")

    # --- both ---

    def _answer(self, what: str, failure: Sequence[object], content: bytes = b"") -> None:
        self._store.set(f"{what}/{self.rank}", json.dumps(failure).encode() + b"\n" + content)

    def _await(self, key: str) -> bytes:
        while not self._store.check(key):
            self._check_alive(key)
            time.sleep(_LOOK_SECS)
        content = self._store.get(key)
        # The store is in the memory of one process, for as long as the training lasts.
        self._store.delete(key)
        return content


def _content_of(answer: bytes, rank: int) -> bytes:
    failure, _, content = answer.partition(b"\n")
    code, *details = json.loads(failure) or [None]
    if code is None:
        return content
    if code == _NON_FINITE:
        text, step, names = details
        raise NonFiniteError(f"rank {rank}: {text}", step=step, names=names)
    message = f"rank {rank} could not write its part: {details[0]}"
    raise OSError(code, message) if code else CheckpointError(message)
