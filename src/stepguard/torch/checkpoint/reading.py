"""Reads checkpoints while their run goes on saving and pruning, for example for an evaluation or an export.

A reader takes no lock. It first opens all files of a checkpoint and then reads them, so a checkpoint that is pruned
meanwhile stays readable through the open files. If it is pruned before all files are open, the reader starts again with
the checkpoint that is newest then.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepguard.disk import files, system
from stepguard.errors import CheckpointCorruptError, NoGoodCheckpointError
from stepguard.options.checks import check_local
from stepguard.store import Checkpoint, CheckpointStore
from stepguard.torch.checkpoint.files import APART, ENGINE, SUFFIX, frozen_file, is_process, process_file, read_file
from stepguard.torch.checkpoint.frozen import DIRECTORY, joined
from stepguard.torch.checkpoint.process_state import read_process
from stepguard.torch.checkpoint.redistribution import read_sharded
from stepguard.torch.checkpoint.sharded_tensors import Shardings
from stepguard.words import listed, logger

_log = logger(__name__)

NEWEST = "newest"

# A run that saves and prunes without a pause may prune the listed checkpoints each time before they are opened.
_TRIES = 100


class States(dict[str, Any]):
    """The plain ``state_dict`` of each part of a checkpoint, by its name; the tensors are on the CPU.

    ``step`` is the step of the checkpoint, ``path`` its path.
    """

    def __init__(self, states: Mapping[str, Any], step: int, path: Path) -> None:
        super().__init__(states)
        self.step = step
        self.path = path


@dataclass(frozen=True, slots=True)
class Newest:
    """The contents of the newest good checkpoint of a logdir, by which a program can build itself.

    ``parts`` are the names of the saved objects. ``groups`` has the names of the parameters in each group of each
    optimizer, such as ``model.0.weight`` (``None`` for a parameter that is in no module). ``frozen`` are the names of
    the parameters that do not train.
    """

    step: int
    path: Path
    parts: tuple[str, ...]
    groups: Mapping[str, list[list[str | None]]] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


def load(path: str | os.PathLike[str], which: int | str = NEWEST) -> States:
    """Verify and read a checkpoint; its run may go on meanwhile. Any thread and process. Writes nothing.

    Args:
        path: the logdir of a run, or one checkpoint in it.
        which: the step to read, or ``"newest"`` for the newest good checkpoint; a warning names newer damaged ones.

    Raises:
        ValueError: ``path`` is an address such as ``s3://bucket/run``.
        FileNotFoundError: there is no such checkpoint.
        CheckpointCorruptError: the requested checkpoint is damaged.
        NoGoodCheckpointError: checkpoints exist, but all are damaged.
        CheckpointError: a file holds something that could run code; nothing in it was used.
    """
    check_local("path", path)
    with _held(Path(path), which) as held:
        process = held.process
        states = {name: held.whole(name, process) for name in held.parts}
        sharded = process.get("sharded", {})
        if sharded:
            with held.as_directory() as directory:
                shardings = {name: Shardings(name, {}) for name in sharded}
                states.update(read_sharded(directory, sharded, shardings))
        return States(states, process["global_step"], held.path)


def newest(logdir: str | os.PathLike[str]) -> Newest | None:
    """The contents of the newest good checkpoint of ``logdir``; ``None`` if there are no checkpoints. Writes nothing.

    A program that unfreezes layers or adds parameter groups during its run can build itself as the checkpoint has it.

    Raises:
        ValueError: ``logdir`` is an address such as ``s3://bucket/run``.
        NoGoodCheckpointError: checkpoints exist, but all are damaged.
    """
    check_local("logdir", logdir)
    try:
        with _held(Path(logdir), NEWEST) as held:
            process = held.process
            notes = process.get("program", {})
            return Newest(
                process["global_step"],
                held.path,
                (*held.parts, *process.get("sharded", {})),
                notes.get("parameters", {}),
                tuple(notes.get("frozen", ())),
            )
    except FileNotFoundError:
        return None


class _Held:
    """One checkpoint with all its files open."""

    def __init__(self, checkpoint: Checkpoint, descriptors: Mapping[str, int]) -> None:
        self.path = checkpoint.path
        # On Linux these paths lead to the open files even after their names are gone.
        self._places = {name: system.place_of(descriptor) for name, descriptor in descriptors.items()}
        names = [name.removesuffix(SUFFIX) for name in descriptors if name.endswith(SUFFIX)]
        parts = [name for name in names if not is_process(name) and "/" not in name]
        frozen = [name.rpartition("/")[2] for name in names if name == f"{DIRECTORY}/{name.rpartition('/')[2]}"]
        self.parts = list(dict.fromkeys(parts + frozen))

    def digest(self, name: str) -> tuple[int, str]:
        """Size in bytes and digest of a file."""
        return files.digest(self._places[name])

    def read(self, name: str) -> Any:
        """The content of the file of a part."""
        return read_file(self._places[f"{name}{SUFFIX}"])

    @functools.cached_property
    def process(self) -> Mapping[str, Any]:
        """The state of process 0."""
        name = process_file(0)
        if name not in self._places:
            raise CheckpointCorruptError(
                f"{self.path}: expected the file {name} in its manifest, found none", path=self.path
            )
        return read_process(self.path / name, self._places[name])

    def whole(self, part: str, process: Mapping[str, Any]) -> Any:
        """The state of a part, with its frozen parameters; ``process`` is the content of the file of process 0."""
        if frozen_file(part) not in self._places:
            return self.read(part)
        state = self.read(part) if f"{part}{SUFFIX}" in self._places else None
        return joined(part, state, read_file(self._places[frozen_file(part)]), process.get(APART, {}))

    @contextmanager
    def as_directory(self) -> Iterator[Path]:
        """A temporary directory in which the open files have their names."""
        with tempfile.TemporaryDirectory(prefix="stepguard-") as directory:
            for name, place in self._places.items():
                if "/" in name:
                    continue  # Sharded state, which is read in this way, has no directories.
                (Path(directory) / name).symlink_to(place)
            yield Path(directory)


@contextmanager
def _held(path: Path, which: int | str) -> Iterator[_Held]:
    store, wanted = _store_and_name(path)
    with ExitStack() as stack:
        yield stack.enter_context(_opened(store, wanted, which))


def _store_and_name(path: Path) -> tuple[CheckpointStore, str | None]:
    """The store of the logdir ``path``; or, if ``path`` is a checkpoint, the store of its logdir and its name."""
    is_checkpoint = path.is_dir() and (path / process_file(0)).exists()
    root = path.parent if is_checkpoint else path
    return CheckpointStore(root, engine=ENGINE), path.name if is_checkpoint else None


@contextmanager
def _opened(store: CheckpointStore, wanted: str | None, which: int | str) -> Iterator[_Held]:
    for _ in range(_TRIES):
        damaged: list[str] = []
        for checkpoint in _listed(store, wanted, which):
            with ExitStack() as stack:
                try:
                    held = _open_all(store, checkpoint, stack)
                except FileNotFoundError:
                    break  # The checkpoint was pruned just now: list again.
                except (CheckpointCorruptError, OSError) as error:
                    if wanted is not None or which != NEWEST:
                        raise
                    damaged.append(str(error))
                    continue
                if damaged:
                    _log.warning("%s is read, since newer ones are damaged: %s", checkpoint.path, listed(damaged))
                yield held
                return
        else:
            raise NoGoodCheckpointError(
                f"{store.root}: expected a good checkpoint, found none: {listed(damaged)}", path=store.root
            )
    raise FileNotFoundError(f"{store.root}: each checkpoint was gone before its files could be opened")


def _listed(store: CheckpointStore, wanted: str | None, which: int | str) -> list[Checkpoint]:
    found = [one for one in store.candidates() if one.is_committed]
    if wanted is not None:
        found = [one for one in found if one.name == wanted]
    elif which != NEWEST:
        if isinstance(which, bool) or not isinstance(which, int):
            raise ValueError(f"which: expected a step or {NEWEST!r}, found {which!r:.80}")
        found = [one for one in found if one.step == which]
    if not found:
        steps = listed([str(one.step) for one in store.candidates() if one.is_committed]) or "none"
        what = "a checkpoint" if which == NEWEST else f"a checkpoint of step {which}"
        raise FileNotFoundError(f"{store.root}: expected {wanted or what}, found the steps: {steps}")
    return found


def _open_all(store: CheckpointStore, checkpoint: Checkpoint, stack: ExitStack) -> _Held:
    """Open the files that the manifest names, compare each with its size and digest, and read that of the process."""
    manifest = store.read_manifest(checkpoint)
    if manifest is None:
        raise FileNotFoundError(str(checkpoint.path))
    descriptors = {}
    for record in manifest.files:
        descriptor = files.open_regular(store.root / record.name)
        stack.callback(os.close, descriptor)
        descriptors[_inside(checkpoint, record.name)] = descriptor
    held = _Held(checkpoint, descriptors)
    for record in manifest.files:
        path = store.root / record.name
        size, digest = held.digest(_inside(checkpoint, record.name))
        if (size, digest) != (record.size, record.digest):
            raise CheckpointCorruptError(
                f"{path}: expected {record.size} bytes of the digest {record.digest}, found {size} of {digest}; run "
                f"`stepguard verify {store.root}`",
                path=path,
            )
    held.process  # noqa: B018 - what it holds may be damage too
    return held


def _inside(checkpoint: Checkpoint, file: str) -> str:
    """The name of a file in the directory of its checkpoint; those of a foreign checkpoint beside it stay apart."""
    return file.removeprefix(f"{checkpoint.name}/")
