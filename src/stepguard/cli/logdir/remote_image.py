"""An image of a mirror: a directory for a moment in which commands find it as they find a logdir.

Manifests and what goes along with checkpoints are fetched. Of every other object there is a file of its size, without
its bytes: `ls` and `status` need no more. Who reads bytes has them fetched for as long as it reads (:func:`filled`).
What is printed has the address in the place of the directory.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from stepguard.cli.logdir import addresses
from stepguard.disk import schema
from stepguard.disk.new_file import NewFile
from stepguard.options.checks import check_mirror, is_url
from stepguard.remote.history import is_history
from stepguard.remote.objects import Remote, RemoteError
from stepguard.remote.opening import open_remote
from stepguard.store import statefile
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX

# By the directory of the image: the place, and the sizes of its objects.
_images: dict[str, Image] = {}


class Image:
    """The image of one mirror, in a directory that is removed with the command."""

    def __init__(self, url: str) -> None:
        self.remote: Remote = open_remote(url)
        self.url = url.rstrip("/")
        self._holder = tempfile.TemporaryDirectory(prefix="stepguard-")
        self.path = Path(self._holder.name)
        found = self.remote.objects()
        if not found:
            self.close()
            raise RemoteError(f"{self.url}: expected a mirror, found nothing there", url=self.url)
        self._sizes = {one.key: one.size for one in found if schema.is_name(one.key) and not one.key.startswith(".")}
        for one in found:
            if one.key in self._sizes:
                self._put(one.key)
                os.utime(self.path / one.key, (one.modified, one.modified))
        _images[str(self.path)] = self
        addresses.note(self.path, self.url)

    def _put(self, key: str) -> None:
        path = self.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if key.endswith(MANIFEST_SUFFIX) or key == statefile.FILE_NAME or is_history(key):
            self._fetch(key)
        else:
            with open(path, "wb") as file:
                file.truncate(self._sizes[key])

    def _fetch(self, key: str) -> None:
        with NewFile(self.path / key) as file:
            for block in self.remote.read(key):
                file.write(block)

    @contextlib.contextmanager
    def filled(self, name: str) -> Iterator[None]:
        """A block in which the files of the checkpoint ``name`` have their bytes."""
        keys = [
            key for key in self._sizes if key.startswith((name + "/", name + ".")) and not key.endswith(MANIFEST_SUFFIX)
        ]
        times = {key: os.stat(self.path / key).st_mtime for key in keys}
        try:
            for key in keys:
                self._fetch(key)
                os.utime(self.path / key, (times[key], times[key]))
            yield
        finally:
            for key in keys:
                with contextlib.suppress(OSError):
                    os.truncate(self.path / key, 0)
                    os.truncate(self.path / key, self._sizes[key])
                    os.utime(self.path / key, (times[key], times[key]))

    def close(self) -> None:
        """Remove the directory."""
        _images.pop(str(self.path), None)
        self._holder.cleanup()


def image_of(path: Path) -> Image | None:
    """The image whose directory this is; ``None`` for a logdir."""
    return _images.get(str(path))


def filled(root: Path, name: str) -> contextlib.AbstractContextManager[object]:
    """A block in which the bytes of a checkpoint can be read, also if ``root`` is an image."""
    image = image_of(root)
    return contextlib.nullcontext() if image is None else image.filled(name)


def opened(value: str, context: click.Context | None) -> str:
    """The path for an argument: itself, or the directory of an image that lives as long as the command.

    Raises RemoteError if the mirror cannot be reached, or has nothing in it.
    """
    if context is None or context.resilient_parsing or not is_url(value):
        return value
    try:
        address, name = _split(value)
        image = Image(address)
    except (ValueError, ModuleNotFoundError) as error:
        raise click.BadParameter(str(error)) from error
    context.call_on_close(image.close)
    context.call_on_close(_renamed_output())
    return str(image.path / name) if name else str(image.path)


def _split(value: str) -> tuple[str, str]:
    """The address of the mirror, and the name of the checkpoint that is meant, if one is."""
    check_mirror(value)
    parent, _, last = value.rstrip("/").rpartition("/")
    name = last.removesuffix(MANIFEST_SUFFIX)
    if "://" in parent and not parent.endswith(":/") and open_remote(parent).head(name + MANIFEST_SUFFIX) is not None:
        return parent, name
    return value, ""


class _Renaming:
    """Standard output, with addresses in the place of directories."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(addresses.shown(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _renamed_output() -> Any:
    stream = sys.stdout
    if isinstance(stream, _Renaming):
        return lambda: None
    sys.stdout = _Renaming(stream)

    def restore() -> None:
        sys.stdout = stream

    return restore
