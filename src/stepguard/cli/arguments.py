"""The kinds of arguments that commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stepguard.disk.schema import MOST_DIGITS
from stepguard.options.checks import check_local, is_url
from stepguard.words import printable

if TYPE_CHECKING:
    from stepguard.cli.logdir.contents import ListedCheckpoint

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Logdir(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        _check_local(value)
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(printable(error.message), param, ctx)


LOGDIR = _Logdir(exists=True, file_okay=False, path_type=Path)
"""A directory that exists, on a file system of this machine."""


class _LogdirOrUrl(_Logdir):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_opened(os.fspath(value), ctx), param, ctx)


def _opened(value: str, context: click.Context | None) -> str:
    if not is_url(value):
        return value
    from stepguard.cli.logdir import remote_image

    return remote_image.opened(value, context)


LOGDIR_OR_URL = _LogdirOrUrl(exists=True, file_okay=False, path_type=Path)
"""A directory that exists, or a mirror at an address, of which the command gets an image."""


def mirror_at(_context: click.Context, _argument: click.Parameter, value: str) -> str:
    """A callback for the address of a mirror, or a directory."""
    from stepguard.options.checks import check_mirror
    from stepguard.remote.opening import open_remote

    try:
        check_mirror(value)
        open_remote(value)
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise click.BadParameter(printable(str(error))) from error
    return value


NEW_LOGDIR = _Logdir(file_okay=False, path_type=Path)
"""A directory that may not exist yet, on a file system of this machine."""


def _check_local(value: str | os.PathLike[str]) -> None:
    try:
        check_local("the place", value)
    except ValueError as error:
        raise click.BadParameter(printable(str(error))) from error


class _Seconds(click.FloatRange):
    """A finite number of seconds. A range alone lets NaN pass, since no comparison with NaN is true."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"expected a finite number of seconds, found {seconds}", param, ctx)
        return seconds


SECONDS = _Seconds(min=0)
"""A finite number of seconds, at least 0."""

SECONDS_BETWEEN = _Seconds(min=0.01)
"""A finite number of seconds between two things."""


STEP = click.IntRange(min=1, max=10**MOST_DIGITS - 1)
"""The number of a step that has been done."""


def some_of(among: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """A callback for names out of ``among``, separated by commas."""

    def convert(_context: click.Context, _option: click.Parameter, value: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(one.strip() for one in value.split(",") if one.strip()))
        unknown = next((one for one in found if one not in among), None)
        if unknown is not None or not found:
            shown = "none" if unknown is None else repr(printable(unknown))
            raise click.BadParameter(f"expected some of {', '.join(among)}, found {shown}")
        return found

    return convert


@dataclass(frozen=True, slots=True)
class Target:
    """The meaning of a path: a logdir, with ``name`` None, or the checkpoint ``name`` in the directory ``root``.

    ``file`` is the path of a single file of PyTorch, in a checkpoint or alone.
    """

    path: Path
    root: Path
    name: str | None
    file: Path | None = None

    def checkpoint(self) -> ListedCheckpoint:
        """The checkpoint or single file to read; for a logdir, the checkpoint that a restart would take.

        Raises click.UsageError if there is none.
        """
        from stepguard.cli.logdir.contents import list_contents, list_one

        if self.file is not None:
            return list_one(self.file.parent, self.file.name)
        if self.name is not None:
            return list_one(self.root, self.name)
        for one in list_contents(self.root).found:
            if one.is_next:
                return one
        raise click.UsageError(
            f"{printable(str(self.path))}: expected a checkpoint, found none that a restart could take"
        )


def target_argument(name: str, metavar: str, *, takes_urls: bool = True) -> Callable[[_Function], _Function]:
    """An argument that names a logdir, or a checkpoint by its directory, its TensorFlow prefix or one of its files.

    It may be in a mirror, of which the command gets an image. A path that is neither is a mistake in the arguments.
    """
    return click.argument(
        name,
        metavar=metavar,
        callback=lambda context, _argument, value: _target(_opened(value, context) if takes_urls else value),
    )


def _target(value: str) -> Target:
    from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX

    _check_local(value)
    # Resolve ".", which has no name and may be a checkpoint. "/" has no name at all, and is no checkpoint.
    path = Path(value) if Path(value).name else Path(value).absolute()
    holder = path.parent if path.parent.name else path.absolute().parent
    if path.is_file() and holder.with_name(holder.name + MANIFEST_SUFFIX).is_file():
        return Target(path, holder.parent, holder.name, path if _is_single(path) else None)
    owner = _owner(path.name)
    if owner and not path.is_dir():
        path = path.with_name(owner)
    if _is_checkpoint(path):
        return Target(Path(value), path.parent, path.name, path if _is_single(path) else None)
    if path.is_dir():
        return Target(Path(value), path, None)
    raise click.BadParameter(f"{printable(value)}: there is neither a logdir nor a checkpoint of that name")


def _owner(file_name: str) -> str | None:
    """The checkpoint whose manifest, entry file or data file has this name."""
    from stepguard.store import tensorflow_files
    from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX

    if file_name.endswith(MANIFEST_SUFFIX):
        return file_name[: -len(MANIFEST_SUFFIX)]
    return tensorflow_files.checkpoint_of_entry(file_name) or tensorflow_files.checkpoint_of_data(file_name)


def _is_checkpoint(path: Path) -> bool:
    from stepguard.cli.logdir.contents import JAX_FILES
    from stepguard.store import tensorflow_files
    from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX

    if not path.name:
        return False
    records = (path.name + MANIFEST_SUFFIX, tensorflow_files.entry_file(path.name))
    if any(path.with_name(one).is_file() for one in records):
        return True
    if path.is_file():
        return _is_single(path)
    # A directory without a manifest may still hold what PyTorch or Orbax has written.
    is_written = path.is_dir() and (any(path.glob("*.pt")) or any((path / one).is_file() for one in JAX_FILES))
    return is_written and not any(path.glob("*" + MANIFEST_SUFFIX))


def _is_single(path: Path) -> bool:
    """Whether `show` can read this file by itself."""
    return path.suffix in (".pt", ".pth") and path.is_file()
