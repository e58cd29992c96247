"""Stores of two layouts, and checkpoints to put into them: shared by the tests of the store."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepguard.disk import files
from stepguard.store import Checkpoint, CheckpointStore, tensorflow_files
from stepguard.store.layout import SaverFiles

Content = dict[str, bytes]


def tensorflow_content(name: str, tag: object) -> Content:
    return {
        f"{name}.data-00000-of-00002": f"first shard of {name} {tag} ".encode() * 40,
        f"{name}.data-00001-of-00002": f"second shard of {name} {tag} ".encode() * 40,
        f"{name}.index": f"index of {name} {tag} ".encode() * 10,
        f"{name}.meta": f"meta of {name} {tag} ".encode() * 10,
    }


def directory_content(name: str, tag: object) -> Content:
    return {
        f"{name}/model.bin": f"model of {name} {tag} ".encode() * 40,
        f"{name}/optimiser/state.bin": f"state of {name} {tag} ".encode() * 40,
    }


LAYOUTS: dict[str, tuple[SaverFiles | None, Callable[[str, object], Content]]] = {
    "tensorflow": (tensorflow_files, tensorflow_content),
    "directory": (None, directory_content),
}

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def open_store(root: Path, layout: str = "tensorflow", **options: Any) -> CheckpointStore:
    return CheckpointStore(root, saver_files=LAYOUTS[layout][0], engine=layout, **options)


def put(place: Path, content: Content) -> None:
    for name, value in content.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(value)


def save(store: CheckpointStore, step: int | None, tag: object = "") -> Checkpoint:
    name = store.name(step)
    put(store.stage(name), LAYOUTS[store.engine][1](name, tag))
    return store.commit(name, step)


def content_of(checkpoint: Checkpoint) -> Content:
    found = {}
    for path in checkpoint.root.rglob("*"):
        inside = path.relative_to(checkpoint.root).as_posix()
        is_its = inside.startswith((checkpoint.name + ".", checkpoint.name + "/"))
        if path.is_file() and is_its and not inside.endswith(".manifest.json"):
            found[inside] = path.read_bytes()
    return found


def good_of(store: CheckpointStore) -> Checkpoint:
    good = store.newest_good().checkpoint
    assert good is not None
    return good


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def snapshot_of(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


class FaultyOs:
    """The real ``os``; the call with number ``at`` raises an error, or kills the process."""

    COUNTED = frozenset(
        "open read readv write fsync close replace link unlink rmdir mkdir lstat listdir".split()  # noqa: SIM905
    )

    def __init__(self, at: int | None = None, number: int | None = None) -> None:
        self.at = at
        self.number = number
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.COUNTED:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls != self.at:
                return real(*arguments, **options)
            if self.number is None:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "close":
                real(*arguments)
            raise OSError(self.number, os.strerror(self.number or 0), "injected")

        return call


def prepared(root: Path, layout: str, steps: tuple[int | None, ...]) -> CheckpointStore:
    store = open_store(root, layout, max_to_keep=2)
    for step in steps[:-1]:
        save(store, step, "old")
    return store


def save_and_prune(store: CheckpointStore, step: int | None, tag: str) -> None:
    stage = store.stage(store.name(step))
    try:
        put(stage, LAYOUTS[store.engine][1](store.name(step), tag))
        store.commit(store.name(step), step)
    except BaseException:
        store.discard(stage)
        raise
    store.prune()


# For processes that import the package, and this file, as we did: from wherever they are.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(files.__file__).parents[2]), str(Path(__file__).parent)]),
}
