"""The names of the files that TensorFlow's own tools write for a checkpoint: all that Stepguard knows of them is here.

The store knows no framework: TensorFlow's engine and the command line hand this module in as its `SaverFiles`. The
checkpoint ``NAME`` is

- in today's format (V2): ``NAME.index``, the entry file; its shards ``NAME.data-00000-of-00002`` and so on; and
  ``NAME.meta``, the graph, which no restore reads;
- in the format before (V1): one file ``NAME``, or shards ``NAME-00000-of-00002`` and so on, for which a state file has
  the pattern ``NAME-?????-of-00002``.

No function here touches the disk. A name may have a directory before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ENTRY = ".index"
_META = ".meta"
_SUFFIX = re.compile(r"\.(?:index|meta|data-\d{5,}-of-\d{5,})")
_DATA = re.compile(r"(.+)\.data-(\d{5,})-of-(\d{5,})", re.DOTALL)
_OLD_SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})", re.DOTALL)
_OLD_SUFFIX = re.compile(r"-\d{5,}-of-\d{5,}")
_PATTERN = re.compile(r"-\?{5}-of-\d{5,}$")


# --- the names that a writer gives ---


def entry_file(name: str) -> str:
    """Return the file by which the checkpoint ``name`` is known if it has no manifest."""
    return name + _ENTRY


def data_file(name: str, number: int = 0, total: int = 1) -> str:
    """Return the data file of the shard ``number`` of ``total``."""
    return f"{name}.data-{number:05d}-of-{total:05d}"


def meta_file(name: str) -> str:
    """Return the file of the graph."""
    return name + _META


def pattern(name: str, total: int | str) -> str:
    """Return the pattern that stands in a state file for the ``total`` shards of the old format."""
    return f"{name}-?????-of-{int(total):05d}"


def without_pattern(path: str) -> str:
    """Return ``model.ckpt-3`` for ``model.ckpt-3-?????-of-00002``, and any other path as it is."""
    return _PATTERN.sub("", path)


# --- to which checkpoint a file belongs ---


def checkpoint_of_entry(file_name: str) -> str | None:
    """Return the checkpoint whose entry file has this name; None for any other file."""
    return file_name[: -len(_ENTRY)] if file_name.endswith(_ENTRY) else None


def checkpoint_of_data(file_name: str) -> str | None:
    """Return the checkpoint that has this data file in today's format; None for any other file."""
    match = _DATA.fullmatch(file_name)
    return match.group(1) if match is not None else None


def without_old_shard(file_name: str) -> str:
    """Return the checkpoint that has this shard of the old format, and any other name as it is."""
    match = _OLD_SHARD.fullmatch(file_name)
    return match.group(1) if match is not None else file_name


def is_old_shard(file_name: str, name: str) -> bool:
    """Whether ``file_name`` is a shard of the checkpoint ``name`` in the old format."""
    return file_name.startswith(name) and _OLD_SUFFIX.fullmatch(file_name[len(name) :]) is not None


def is_own(file_name: str, name: str) -> bool:
    """Whether TensorFlow's tools write ``file_name`` for ``name``, the one file of the old format left out."""
    has_suffix = file_name.startswith(name) and _SUFFIX.fullmatch(file_name[len(name) :]) is not None
    return has_suffix or is_old_shard(file_name, name)


def is_data(file_name: str, name: str) -> bool:
    """Whether ``file_name`` is the entry file or a data file of the checkpoint ``name``, in either format."""
    return file_name == name or (is_own(file_name, name) and is_needed(file_name, name))


def is_needed(file_name: str, name: str) -> bool:
    """Whether a restore of the checkpoint ``name`` reads ``file_name``.

    It does not read the graph, which people often remove because it is a large part of a small checkpoint.
    """
    return file_name != meta_file(name)


# --- what is there ---


def missing_data(name: str, present: Sequence[str]) -> str | None:
    """Return the first data file that the checkpoint ``name`` with the files ``present`` lacks; None if none."""
    has_entry = entry_file(name) in present
    if not has_entry and name in present:
        return None
    form, infix = (_DATA, ".data") if has_entry else (_OLD_SHARD, "")
    shards = [match for one in present if (match := form.fullmatch(one)) and match.group(1) == name]
    if not shards:
        return data_file(name)
    for total in sorted({match.group(3) for match in shards}):
        held = {int(match.group(2)) for match in shards if match.group(3) == total}
        for number in range(int(total)):
            if number not in held:
                return f"{name}{infix}-{number:05d}-of-{total}"
    return None


def stated(names: Iterable[str], listed: Iterable[str]) -> list[str]:
    """Return the names as a state file has them, in a directory with the files ``listed``."""
    there = set(listed)
    totals = {match.group(1): match.group(3) for one in there if (match := _OLD_SHARD.fullmatch(one))}
    return [pattern(name, totals[name]) if name in totals and entry_file(name) not in there else name for name in names]
