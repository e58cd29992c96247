"""The messages between the processes during one try to write one checkpoint, on the threads that write.

The protocol: the chief asks, the others answer, and the chief sends each of them its own content. A thread that waits
for a message polls whether the others can still send it. So if a process ends in the middle, the wait ends, the
checkpoint fails, and no thread waits for ever. A process that has failed answers with its error. A kill leaves keys in
the common store that no process reads again.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence

from stepguard.errors import CheckpointError, NoBoundaryError, NonFiniteError, described
from stepguard.steps.common_store import CommonStore, awaited

# Sent in place of the errno of an OSError.
_NON_FINITE = -1
_NO_BOUNDARY = -2


class PartMessages:
    """The messages of one try, in a part of the store that belongs to it.

    ``check_alive`` is polled during each wait for a message, and raises if no message can come.
    """

    def __init__(self, store: CommonStore, rank: int, size: int, check_alive: Callable[[str], None]) -> None:
        self.rank = rank
        self._store = store
        self._size = size
        self._check_alive = check_alive
        # The keys to delete at the end. The store is in the memory of one process as long as the training lasts.
        self._said: list[str] = []

    @property
    def others(self) -> int:
        """The number of processes besides the chief."""
        return self._size - 1

    # --- the chief ---

    def collect(self, what: str) -> list[bytes]:
        """Wait until all others have answered; return the answers in the order of the ranks.

        Raises:
            NonFiniteError: the state of a process is not finite.
            NoBoundaryError: a process has not taken its state and is past the step.
            OSError: a process could not write.
            CheckpointError: a process has failed in another way, or no longer answers.
        """
        # Wait for all answers before raising an error: other processes may still be writing to the directory.
        keys = [f"{what}/{rank}" for rank in range(1, self._size)]
        answers = awaited(self._store, keys, self._check(" to ".join(sorted({keys[0], keys[-1]}))))
        return [_content_of(answer, rank) for rank, answer in enumerate(answers, start=1)]

    def deal(self, what: str, content: Sequence[bytes]) -> None:
        """Send each of the others its own part of ``content``."""
        for rank, one in enumerate(content, start=1):
            self._store.set(f"{what}/{rank}", one)

    # --- the others ---

    def answer(self, what: str, content: bytes) -> None:
        """Send ``content`` to the chief."""
        self._answer(what, [], content)

    def answer_error(self, what: str, error: Exception) -> None:
        """Send the chief ``error`` in place of the content."""
        if isinstance(error, NonFiniteError):
            self._answer(what, [_NON_FINITE, str(error), error.step, error.names])
        elif isinstance(error, NoBoundaryError):
            self._answer(what, [_NO_BOUNDARY, str(error)])
        elif isinstance(error, OSError):
            self._answer(what, [error.errno or errno.EIO, described(error)])
        else:
            self._answer(what, [0, described(error)])

    def receive(self, what: str) -> bytes:
        """Wait for the content that the chief sends to this process."""
        key = f"{what}/{self.rank}"
        content = awaited(self._store, [key], self._check(key))[0]
        self._said.append(key)
        return content

    def forget(self) -> None:
        """Delete the messages to and from this process, which no process reads any more."""
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
