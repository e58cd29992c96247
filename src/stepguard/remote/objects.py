"""The protocol of a remote place: a flat set of named objects, each of which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK_BYTES = 1 << 20
"""The size of the blocks in which files are read, digested and sent."""


class RemoteError(OSError):
    """The remote place did not do what it was asked: network, permission, credentials, or its own disk.

    ``url`` is the place. It is an OSError, so that what retries a failing disk retries this as well.
    """

    def __init__(self, message: str, *, url: str) -> None:
        super().__init__(message)
        self.url = url


class ConditionError(RemoteError):
    """A conditional write was refused: the object exists already, or is another one than was expected."""


class NoConditionsError(RemoteError):
    """The place has no conditional writes, or ignores them."""


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """One object: its key with ``/``, its size in bytes, its last write (Unix time of the place), and its version tag.

    The tag changes whenever the object does. It is ``None`` if the place has none.
    """

    key: str
    size: int
    modified: float
    tag: str | None = None


class Remote(Protocol):
    """One remote place. Any thread may call any method; calls of several threads go on side by side.

    Every method raises RemoteError for what may succeed later, and FileNotFoundError for an object that is not there.
    """

    @property
    def url(self) -> str:
        """The address, without secrets, for messages."""

    def reopen(self) -> None:
        """Look for credentials again, as before a try that follows a failed one."""

    def objects(self, prefix: str = "") -> list[RemoteObject]:
        """Return the objects whose keys begin with ``prefix``, sorted by key. A place without objects has none."""

    def head(self, key: str) -> RemoteObject | None:
        """Return what is known of one object without reading it; ``None`` if it is not there."""

    def read(self, key: str) -> Iterator[bytes]:
        """Return the content of an object in blocks."""

    def write(self, key: str, blocks: Iterable[bytes], size: int) -> bool:
        """Write ``size`` bytes as one object, which appears when all of them are there. Large ones go in parts.

        An error raised by ``blocks`` leaves the object as it was, and is raised here. Returns whether the place itself
        has proven, by a checksum of what it stored, that these bytes arrived. Otherwise the caller reads them back.
        """

    def put(self, key: str, content: bytes) -> str | None:
        """Write a small object, and return its tag."""

    def create(self, key: str, content: bytes) -> str | None:
        """Write a small object that must not exist yet, and return its tag.

        Raises ConditionError if it exists, NoConditionsError if the place cannot tell.
        """

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        """Write a small object that must still have this tag, and return the new one.

        Raises ConditionError if it has another, or is gone; NoConditionsError if the place cannot tell.
        """

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the place, without sending its bytes through this machine."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects. One that is not there is no error."""


def read_whole(remote: Remote, key: str, *, most: int) -> bytes:
    """Return the content of a small object. Raises RemoteError if it has more than ``most`` bytes."""
    content = b""
    for block in remote.read(key):
        content += block
        if len(content) > most:
            raise RemoteError(f"{remote.url}/{key}: expected at most {most} bytes, found more", url=remote.url)
    return content
