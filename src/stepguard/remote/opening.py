"""Which kind of remote place an address means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepguard.options.checks import check_mirror, is_url
from stepguard.remote.directory import DirectoryRemote
from stepguard.remote.object_store import ObjectStoreRemote
from stepguard.remote.objects import Remote


def open_remote(place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Remote:
    """Return the remote place at an address, or at a path. Nothing is asked of it yet.

    Raises ValueError for an address that no store has, ModuleNotFoundError if obstore is not installed.
    """
    check_mirror(place)
    text = os.fspath(place)
    if text.startswith("file://"):
        return DirectoryRemote(Path(text.removeprefix("file://")))
    return ObjectStoreRemote(text, options) if is_url(text) else DirectoryRemote(Path(text))
