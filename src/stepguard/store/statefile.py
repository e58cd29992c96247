"""The file ``checkpoint``: TensorFlow's ``CheckpointState`` in protobuf text format, read by all of its tools.

It is written as ``tf.compat.v1.train.Saver`` writes it, with ``last_preserved_timestamp`` added (as in
``tf.train.CheckpointManager``), so that "keep one every n hours" continues after a restart. Stepguard reads it only as
a hint: the directory is the truth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stepguard.disk import files, schema
from stepguard.store import tensorflow_files

FILE_NAME = "checkpoint"

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "'": "\\'", "\\": "\\\\"}
_UNESCAPES = {"n": b"\n", "r": b"\r", "t": b"\t"}
_LINE = re.compile(r"""^\s*(\w+)\s*:\s*(?:"((?:[^"\\\n]|\\.)*)"|'((?:[^'\\\n]|\\.)*)'|([^\s"']+))\s*$""")
_ESCAPED = re.compile(rb"\\([0-7]{1,3}|.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """The contents of a state file: the ``path`` of the newest as written there, and the names of all, oldest first.

    Patterns for the shards of TensorFlow's old format are removed: see `tensorflow_files.without_pattern`.
    """

    path: Path
    names: tuple[str, ...]
    last_preserved: float | None

    @property
    def newest(self) -> str:
        """The name of the newest, without its directory, which is out of date if the logdir was moved."""
        return self.path.name


def write(
    root: Path, newest: str, names: Sequence[str], *, last_preserved: float | None = None, relative_paths: bool = False
) -> None:
    """Replace the state file of ``root``, atomically and durably.

    Paths are absolute if ``root`` is absolute and ``relative_paths`` is false, else relative to it, as in the Saver.
    """
    place = root if root.is_absolute() and not relative_paths else Path()
    files.write_atomic(root / FILE_NAME, content(newest, names, place, last_preserved=last_preserved))


def content(newest: str, names: Sequence[str], place: Path, *, last_preserved: float | None = None) -> bytes:
    """Return the bytes of a state file. Its paths are in the directory ``place``; ``Path()`` makes them relative."""

    def quoted(name: str) -> str:
        path = str(place / name)
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            # A protobuf string must be UTF-8, and this logdir's path is not. A relative path works for all readers.
            path = name
        return '"' + "".join(_escaped(character) for character in path) + '"'

    lines = [f"model_checkpoint_path: {quoted(newest)}\n"]
    lines += [f"all_model_checkpoint_paths: {quoted(name)}\n" for name in names]
    if last_preserved is not None:
        lines.append(f"last_preserved_timestamp: {float(last_preserved)!r}\n")
    return "".join(lines).encode("utf-8")


def read(root: Path) -> CheckpointState | None:
    """Read the state file of ``root``, which is only a hint; None if it is missing, empty, garbage or unreadable."""
    try:
        return parse(files.read_bytes(root / FILE_NAME))
    except OSError:
        return None


def parse(written: bytes) -> CheckpointState | None:
    """Read the bytes of a state file; None if they are none."""
    try:
        text = written.decode("utf-8")
    except UnicodeDecodeError:
        return None
    newest = None
    names: list[str] = []
    last_preserved = None
    for line in text.split("\n"):
        match = _LINE.match(line)
        if match is None:
            continue
        key, double, single, bare = match.groups()
        if key == "last_preserved_timestamp" and bare is not None:
            last_preserved = _time(bare)
            if last_preserved is None:
                return None
        quoted = double if double is not None else single
        if quoted is None:
            continue
        path = Path(tensorflow_files.without_pattern(_unescaped(quoted)))
        if not schema.is_name(path.name) or "\0" in str(path):
            continue
        if key == "model_checkpoint_path":
            newest = path
        elif key == "all_model_checkpoint_paths":
            names.append(path.name)
    if newest is None:
        return None
    return CheckpointState(newest, tuple(names), last_preserved)


def _time(text: str) -> float | None:
    try:
        time = float(text)
    except ValueError:
        return None
    return time if schema.is_of(time, (float,)) else None


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if ord(character) < 32 or ord(character) == 127:
        return f"\\{ord(character):03o}"
    return character


def _unescaped(text: str) -> str:
    def plain(match: re.Match[bytes]) -> bytes:
        escape = match.group(1)
        if escape[:1].isdigit():
            return bytes([int(escape, 8) & 255])
        return _UNESCAPES.get(escape.decode("latin-1"), escape)

    return _ESCAPED.sub(plain, text.encode("utf-8")).decode("utf-8", "replace")
