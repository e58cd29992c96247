"""What the processes tell each other about one try to write one checkpoint, in the threads that write.

The others answer the chief's questions, and the chief deals to each what is for it. Who waits for an answer looks
meanwhile whether the others still can come: so a process that ends in the middle ends the exchange, and the checkpoint,
and nobody waits for good. A question is answered also by who has failed, with its error. A kill leaves keys in the
common store that nobody reads again.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence

from stepguard.errors import CheckpointError, NoBoundaryError, NonFiniteError, described
from stepguard.steps.common_store import CommonStore, awaited

# In place of the number of an error of the operating system.
_NON_FINITE = -1
_NO_BOUNDARY = -2


class Exchange:
    """One try, in a part of the store that belongs to it.

    ``check_alive`` is called again and again while an answer is awaited, and raises when there will be none.
    """

    def __init__(self, store: CommonStore, rank: int, size: int, check_alive: Callable[[str], None]) -> None:
        self.rank = rank
        self._store = store
        self._size = size
        self._check_alive = check_alive
        # The store is in the memory of one process, for as long as the training lasts.
        self._said: list[str] = []

    @property
    def others(self) -> int:
        """How many processes there are besides the chief."""
        return self._size - 1

    # --- the chief ---

    def collect(self, what: str) -> list[bytes]:
        """What the others say, in the order of their ranks, once all have said it.

        Raises:
            NonFiniteError: the state of one of them is not finite.
            NoBoundaryError: one of them has not taken its state, and is past the step.
            OSError: one of them could not write.
            CheckpointError: one of them has failed in another way, or will not answer any more.
        """
        # All of them first: who has failed may not be the last that still writes to the directory.
        keys = [f"{what}/{rank}" for rank in range(1, self._size)]
        answers = awaited(self._store, keys, self._check(" to ".join(sorted({keys[0], keys[-1]}))))
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
        elif isinstance(error, NoBoundaryError):
            self._answer(what, [_NO_BOUNDARY, str(error)])
        elif isinstance(error, OSError):
            self._answer(what, [error.errno or errno.EIO, described(error)])
        else:
            self._answer(what, [0, described(error)])

    def receive(self, what: str) -> bytes:
        """What the chief says to this process."""
        key = f"{what}/{self.rank}"
        content = awaited(self._store, [key], self._check(key))[0]
        self._said.append(key)
        return content

    def forget(self) -> None:
        """Nobody asks any more: take away what was said to and by this process."""
        for key in self._said:
            self._store.delete(key)
        self._said.clear()

    # --- both ---

    def _answer(self, what: str, failure: Sequence[object], content: bytes = b"") -> None:
        key = f"{what}/{self.rank}"
        self._said.append(key)
        self._store.set(key, json.dumps(failure).encode() + b"\n" + content)

    def _check(self, what: str) -> Callable[[], None]:
        return lambda: self._check_alive(what)


def _content_of(answer: bytes, rank: int) -> bytes:
    failure, _, content = answer.partition(b"\n")
    code, *details = json.loads(failure) or [None]
    if code is None:
        return content
    if code == _NON_FINITE:
        text, step, names = details
        raise NonFiniteError(f"rank {rank}: {text}", step=step, names=names)
    if code == _NO_BOUNDARY:
        raise NoBoundaryError(details[0])
    message = f"rank {rank} could not write its part: {details[0]}"
    raise OSError(code, message) if code else CheckpointError(message)
