"""The manifest: the commit record of a checkpoint. A checkpoint exists when its manifest does, and not before.

It is one JSON object in ``NAME.manifest.json``, readable by people and by any later version. Its last key is the digest
of the others, so that damage to the manifest itself is detected. ``format_version`` is raised only if an older reader
could be misled; an older reader then says so, and does not treat the checkpoint as damaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepguard.disk import files, schema
from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.store import tensorflow_files
from stepguard.store.marks import Marks

FORMAT_VERSION = 1

SUFFIX = ".manifest.json"

# The part after a checkpoint's name: nothing, a suffix, or a file in its directory.
_OWN = re.compile(r"|[./].*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint: its name below the logdir (with ``/``), size in bytes, and digest."""

    name: str
    size: int
    digest: str

    @classmethod
    def from_json(cls, found: object, owner: str) -> FileRecord:
        """The record of a file of the checkpoint ``owner``. Raises SchemaError.

        Pruning removes the files that a manifest names. So a manifest that was copied or made by hand must never name
        files of another checkpoint or outside the logdir.
        """
        kinds = schema.kinds_of(cls)
        record = cls(**schema.checked(found, kinds, required=tuple(kinds)))
        has_its_name = record.name.startswith(owner) and _OWN.fullmatch(record.name[len(owner) :])
        # The name of a shard of TensorFlow's old format continues with neither a dot nor a slash.
        is_own = has_its_name or tensorflow_files.is_old_shard(record.name, owner)
        if not is_own or not schema.is_name(record.name):
            raise schema.SchemaError(f"expected only files of {owner}, found {record.name}")
        if record.size < 0:
            raise schema.SchemaError(f"{record.name}: expected a size of at least 0, found {record.size}")
        return record


@dataclass(frozen=True, slots=True)
class Manifest:
    """The facts of a commit: the engine, the step (None: no steps are counted), the Unix time, and the files.

    ``extra`` has the engine's own JSON values. ``owned`` are the names that the retention rules counted at the commit,
    oldest first, including those that were to be removed next; after a kill the next run removes them. ``marks`` are
    what the program and the user have noted of the checkpoint.
    """

    name: str
    engine: str
    step: int | None
    time: float
    files: tuple[FileRecord, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    owned: tuple[str, ...] = ()
    marks: Marks = field(default_factory=Marks)

    @property
    def size(self) -> int:
        """The size of all files together, in bytes."""
        return sum(record.size for record in self.files)

    def to_json(self) -> bytes:
        """Return the bytes of the manifest file. Raises TypeError or ValueError if ``extra`` is not plain JSON."""
        body: dict[str, Any] = {
            "format_version": self.format_version,
            "name": self.name,
            "engine": self.engine,
            "step": self.step,
            "time": self.time,
            "files": [{"name": one.name, "size": one.size, "digest": one.digest} for one in self.files],
            "extra": dict(self.extra),
            "owned": list(self.owned),
            **self.marks.to_json(),
        }
        body["digest"] = files.digest_bytes(_canonical(body))
        return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, content: bytes, path: Path) -> Manifest:
        """Read the bytes of a manifest, and verify them by its own digest. ``path`` is only for the error.

        Raises CheckpointCorruptError if the manifest is damaged, and CheckpointError if a newer Stepguard wrote it.
        """
        try:
            body = schema.parse(content)
            found = body.pop("digest")
            expected = files.digest_bytes(_canonical(body))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointCorruptError(
                f"{path}: expected a manifest, found {len(content)} bytes that are none ({type(error).__name__})",
                path=path,
            ) from error
        if found != expected:
            raise CheckpointCorruptError(
                f"{path}: expected the digest {expected} of its own content, found {found!r:.80}", path=path
            )
        try:
            return cls._from_body(body, path)
        except schema.SchemaError as error:
            raise CheckpointCorruptError(
                f"{path}: expected the fields of a manifest, found them wrong: {error}", path=path
            ) from error

    @classmethod
    def _from_body(cls, body: dict[str, Any], path: Path) -> Manifest:
        version = schema.checked(body, {"format_version": (int,)}, required=("format_version",))["format_version"]
        if version < 1:
            raise schema.SchemaError(f"format_version: expected at least 1, found {version}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: expected a manifest of format {FORMAT_VERSION} or older, found format {version}; "
                f"it is not damaged, but a newer Stepguard wrote it: upgrade stepguard to read it",
                path=path,
            )
        kinds = {**schema.kinds_of(cls), "files": (list,), "extra": (dict,), "owned": (list,)}
        del kinds["marks"]
        # Manifests of earlier versions have no `owned`.
        known = schema.checked({"owned": [], **body}, kinds, required=tuple(kinds))
        if known["step"] is not None and known["step"] < 0:
            raise schema.SchemaError(f"step: expected at least 0, found {known['step']}")
        records = tuple(FileRecord.from_json(one, known["name"]) for one in known["files"])
        if path.name != known["name"] + SUFFIX:
            raise schema.SchemaError(
                f"expected the manifest of {path.name[: -len(SUFFIX)]}, found that of {known['name']}"
            )
        if not records:
            raise schema.SchemaError("files: expected at least one, found none")
        owned = tuple(one for one in known["owned"] if isinstance(one, str))
        return cls(**{**known, "files": records, "owned": owned, "marks": Marks.from_json(body)})


def named_files(checkpoint: Path) -> list[Path] | None:
    """The files that the manifest of the checkpoint at this path names; None if it has none.

    Whatever else lies in its directory was never committed, nor compared with a digest.

    Raises:
        CheckpointCorruptError: the manifest is damaged.
        OSError: the manifest cannot be read.
    """
    record = checkpoint.with_name(checkpoint.name + SUFFIX)
    try:
        manifest = Manifest.from_json(files.read_bytes(record), record)
    except FileNotFoundError:
        return None
    return [checkpoint.parent / one.name for one in manifest.files]


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
