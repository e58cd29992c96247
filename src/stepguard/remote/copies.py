"""The checkpoints in a remote place: which there are, sending one, fetching one, comparing, removing.

The names are those of a logdir: ``NAME.manifest.json`` beside ``NAME/...`` or ``NAME.<suffix>``, with the same bytes.
So a mirror in a directory is a logdir, and one in a store that is mounted as well. The order of writes is that of a
commit: all data first, proven, and the manifest last; a checkpoint is removed in the opposite order. A kill at any
point leaves objects without a manifest, which are no checkpoint; the next machine that holds the lease removes them.

Nothing in the place is trusted: a manifest is checked as one of a logdir is, and only keys that begin with the name of
a checkpoint are written or removed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stepguard.disk import files
from stepguard.disk.new_file import NewFile
from stepguard.errors import CheckpointCorruptError
from stepguard.remote.objects import BLOCK_BYTES, Remote, RemoteError, RemoteObject, read_whole
from stepguard.remote.pace import Pace
from stepguard.store import FileRecord, Manifest, statefile
from stepguard.store.checkpoint import split_name
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX
from stepguard.words import logger

_log = logger(__name__)

# Files of a checkpoint that are opened before the first is sent, so that pruning cannot take the last ones away.
_MOST_OPEN = 512
# A wrong digest may be of the network: the next try reads again.
_READ_TRIES = 2

_OF_A_CHECKPOINT = re.compile(r"(.+?-[0-9]{1,19})(?:[./].*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Copied:
    """A checkpoint that has a manifest in the remote place.

    ``modified`` is when that was written (Unix time of the place), ``sizes`` the bytes of each of its objects by key.
    """

    name: str
    step: int | None
    modified: float
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of its objects together."""
        return sum(self.sizes.values())


class Copies:
    """The checkpoints in one remote place. Any thread may read; one thread of one machine writes.

    Every method raises RemoteError as the place does.
    """

    def __init__(self, remote: Remote, pace: Pace | None = None) -> None:
        self.remote = remote
        self.pace = Pace() if pace is None else pace
        # What earlier tries of this process have sent and proven, so that a cut does not begin at the first file.
        self._proven: dict[str, FileRecord] = {}

    # --- reading ---

    def listed(self, *, basename: str | None = None) -> list[Copied]:
        """Return the checkpoints, the one to go on from first.

        That is the one of the highest step, unless the state file names another that was written later: the run then
        went back, and on from there.
        """
        found, _ = self._sorted_out(self.remote.objects())
        ranked = [one for one in found if basename is None or split_name(one.name)[0] == basename]
        ranked.sort(key=lambda one: (-1 if one.step is None else one.step, one.modified), reverse=True)
        if len(ranked) > 1:
            newest = self._stated()
            named = next((one for one in ranked if one.name == newest), None)
            if named is not None and named.modified > ranked[0].modified:
                ranked = [named, *(one for one in ranked if one is not named)]
        return ranked

    def _stated(self) -> str | None:
        try:
            state = statefile.parse(read_whole(self.remote, statefile.FILE_NAME, most=files.MOST_BYTES))
        except FileNotFoundError:
            return None
        return None if state is None else state.newest

    @staticmethod
    def _sorted_out(objects: Iterable[RemoteObject]) -> tuple[list[Copied], dict[str, list[str]]]:
        """The checkpoints, and the keys of what looks like parts of others, by their names."""
        by_top: dict[str, list[RemoteObject]] = {}
        manifests: dict[str, RemoteObject] = {}
        for one in objects:
            if "/" not in one.key and one.key.endswith(MANIFEST_SUFFIX):
                manifests[one.key.removesuffix(MANIFEST_SUFFIX)] = one
            else:
                match = _OF_A_CHECKPOINT.fullmatch(one.key)
                top = one.key.partition("/")[0] if "/" in one.key else one.key.partition(".")[0]
                by_top.setdefault(match.group(1) if match else top, []).append(one)
        found = []
        for name, one in manifests.items():
            of_it = by_top.pop(name, [])
            of_it += [] if "-" in name else by_top.pop(name.partition(".")[0], [])
            found.append(Copied(name, split_name(name)[1], one.modified, {each.key: each.size for each in of_it}))
        strays = {name: [one.key for one in group] for name, group in by_top.items() if split_name(name)[1] is not None}
        return found, strays

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a checkpoint.

        Raises FileNotFoundError if it has none, CheckpointCorruptError if it is damaged, CheckpointError if a newer
        Stepguard wrote it.
        """
        path = Path(self.remote.url) / (name + MANIFEST_SUFFIX)
        return Manifest.from_json(read_whole(self.remote, name + MANIFEST_SUFFIX, most=files.MOST_BYTES), path)

    def damages(self, copied: Copied, manifest: Manifest, *, reads: bool) -> list[tuple[FileRecord, str]]:
        """Compare the objects of a checkpoint with its manifest; return those that differ, and how.

        Sizes are compared as they were listed; with ``reads`` all bytes are read.
        """
        found = []
        for record in manifest.files:
            size = copied.sizes.get(record.name)
            if size != record.size:
                there = "none" if size is None else f"{size} bytes"
                found.append((record, f"expected an object of {record.size} bytes, found {there}"))
            elif reads and (reason := self._digest_damage(record)):
                found.append((record, reason))
        return found

    def _digest_damage(self, record: FileRecord) -> str | None:
        try:
            for number in range(_READ_TRIES):
                digest = _Digest()
                for block in self.remote.read(record.name):
                    digest.add(block)
                if digest.is_of(record):
                    return None
                if number:
                    return f"expected the digest {record.digest}, found {digest.text}"
        except FileNotFoundError:
            return f"expected an object of {record.size} bytes, found none"
        return None

    # --- fetching ---

    def fetch(self, manifest: Manifest, place: Path) -> dict[str, tuple[int, str]]:
        """Write all files of a checkpoint below the directory ``place``; return their sizes and digests by name.

        Raises CheckpointCorruptError if an object is not what the manifest says.
        """
        for record in manifest.files:
            self.fetch_file(record, place / record.name)
        return {record.name: (record.size, record.digest) for record in manifest.files}

    def fetch_file(self, record: FileRecord, path: Path) -> None:
        """Write one file of a checkpoint to ``path``, whose directory is made. It is not durable yet.

        Raises CheckpointCorruptError if the object is missing, or not what the record says.
        """
        files.make_dirs(path.parent)
        found = ""
        for _ in range(_READ_TRIES):
            try:
                with NewFile(path) as file:
                    for block in self.remote.read(record.name):
                        file.write(block)
            except FileNotFoundError as error:
                found = f"none ({error})"
                break
            if (file.size, file.digest) == (record.size, record.digest):
                return
            found = f"{file.size} bytes with the digest {file.digest}"
        files.remove_quietly(path)
        raise CheckpointCorruptError(
            f"{self.remote.url}/{record.name}: expected {record.size} bytes with the digest {record.digest}, found "
            f"{found}",
            path=Path(self.remote.url) / record.name,
        )

    # --- sending ---

    def send(
        self,
        root: Path,
        manifest: Manifest,
        before: Manifest | None = None,
        *,
        check: Callable[[], object] = lambda: None,
    ) -> int:
        """Send the checkpoint of this manifest in the directory ``root``; return how many bytes went over the network.

        ``before`` is the manifest of a checkpoint that is whole in the place: what it has too is copied there.
        ``check`` is called before the manifest is written, and raises if this machine must not do that any more.

        Raises FileNotFoundError if a file of the checkpoint is gone here, CheckpointCorruptError if one is not what
        the manifest says, StoppedError if it was given up.
        """
        known = {} if before is None else {(one.size, one.digest): one.name for one in before.files}
        key = manifest.name + MANIFEST_SUFFIX
        with contextlib.ExitStack() as stack:
            opened = {}
            for record in manifest.files[:_MOST_OPEN]:
                opened[record.name] = files.open_regular(root / record.name)
                stack.callback(os.close, opened[record.name])
            # A manifest must never stand beside the files of another save of the same name.
            if self.remote.head(key) is not None:
                self.remote.delete([key])
            sent = sum(self._send_file(root, record, opened.get(record.name), known) for record in manifest.files)
        self.send_manifest(manifest, check=check)
        self._proven = {}
        return sent

    def send_manifest(self, manifest: Manifest, *, check: Callable[[], object] = lambda: None) -> None:
        """Write the manifest of a checkpoint whose files are all in the place, and read it back.

        It replaces the one there at once: a kill leaves one of the two. ``check`` is as of :meth:`send`.
        """
        check()
        key, content = manifest.name + MANIFEST_SUFFIX, manifest.to_json()
        self.pace.take(len(content), url=self.remote.url)
        self.remote.put(key, content)
        if read_whole(self.remote, key, most=len(content)) != content:
            self.remote.delete([key])
            raise RemoteError(f"{self.remote.url}/{key}: expected what was written, read something else", url=self.url)

    @property
    def url(self) -> str:
        """The address."""
        return self.remote.url

    def _send_file(
        self, root: Path, record: FileRecord, descriptor: int | None, known: Mapping[tuple[int, str], str]
    ) -> int:
        if self._proven.get(record.name) == record:
            return 0
        source = known.get((record.size, record.digest))
        if source is not None and source != record.name and self._copied(source, record):
            self._proven[record.name] = record
            return 0
        self.send_file(root / record.name, record, descriptor)
        self._proven[record.name] = record
        return record.size

    def _copied(self, source: str, record: FileRecord) -> bool:
        try:
            self.remote.copy(source, record.name)
            found = self.remote.head(record.name)
        except (RemoteError, FileNotFoundError) as error:
            _log.debug("%s: copying it in the place failed, so it is sent: %s", source, error)
            return False
        return found is not None and found.size == record.size

    def send_file(self, path: Path, record: FileRecord, descriptor: int | None = None) -> None:
        """Send one file, and prove that it has arrived: by the place's own checksum, or by reading it back."""
        with contextlib.ExitStack() as stack:
            if descriptor is None:
                descriptor = files.open_regular(path)
                stack.callback(os.close, descriptor)
            is_proven = self.remote.write(record.name, self._blocks(descriptor, path, record), record.size)
        found = self.remote.head(record.name)
        if found is None or found.size != record.size:
            size = "none" if found is None else f"{found.size} bytes"
            raise RemoteError(
                f"{self.url}/{record.name}: expected the {record.size} bytes that were sent, found {size}", url=self.url
            )
        if not is_proven and (reason := self._digest_damage(record)):
            raise RemoteError(f"{self.url}/{record.name}: what has arrived is wrong: {reason}", url=self.url)

    def _blocks(self, descriptor: int, path: Path, record: FileRecord) -> Iterator[bytes]:
        digest, place = _Digest(), 0
        while block := os.pread(descriptor, BLOCK_BYTES, place):
            place += len(block)
            self.pace.take(len(block), url=self.url)
            digest.add(block)
            if place > record.size:
                break
            yield block
        # Raised before the place has the last word, so that the object never appears.
        if not digest.is_of(record):
            raise CheckpointCorruptError(
                f"{path}: expected {record.size} bytes with the digest {record.digest}, found {place} bytes with the "
                f"digest {digest.text}",
                path=path,
            )

    # --- the state file, and removing ---

    def state(self, newest: str, names: Iterable[str]) -> None:
        """Write the file for TensorFlow's tools, which also says from which checkpoint the run goes on."""
        self.remote.put(statefile.FILE_NAME, statefile.content(newest, list(names), Path()))

    def remove(self, doomed: Iterable[Copied]) -> None:
        """Remove checkpoints, the manifests first."""
        doomed = list(doomed)
        self.remote.delete([one.name + MANIFEST_SUFFIX for one in doomed])
        self.remote.delete([key for one in doomed for key in one.sizes])

    def sweep(self) -> list[str]:
        """Remove what uploads that were cut short have left, and return the keys. Only for who holds the lease."""
        _, strays = self._sorted_out(self.remote.objects())
        keys = sorted(key for group in strays.values() for key in group)
        if keys:
            self.remote.delete(keys)
        return keys


class _Digest:
    """Size and digest of blocks, as `stepguard.disk.files.digest` gives them."""

    def __init__(self) -> None:
        import xxhash

        self._hasher = xxhash.xxh3_128()
        self._size = 0

    def add(self, block: bytes) -> None:
        self._hasher.update(block)
        self._size += len(block)

    @property
    def text(self) -> str:
        return f"{files.DIGEST_KIND}:{self._hasher.hexdigest()}"

    def is_of(self, record: FileRecord) -> bool:
        return (self._size, self.text) == (record.size, record.digest)
