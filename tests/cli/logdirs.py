"""Logdirs without a framework, and how they are damaged."""

from __future__ import annotations

from pathlib import Path

from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.store.layout import SaverFiles


def commit(
    root: Path, *steps: int, basename: str = "model.ckpt", saver_files: SaverFiles | None = tensorflow_files
) -> CheckpointStore:
    """Commit checkpoints of small files, as TensorFlow's are or, without an entry suffix, as PyTorch's are."""
    engine = "torch" if saver_files is None else "tensorflow"
    store = CheckpointStore(root, basename=basename, engine=engine, saver_files=saver_files)
    for step in steps:
        name = store.name(step)
        stage = store.stage(name)
        if saver_files is None:
            (stage / name).mkdir()
            (stage / name / "model.pt").write_bytes(b"weights of step %d" % step)
        else:
            (stage / f"{name}.index").write_bytes(b"index of step %d" % step)
            (stage / f"{name}.data-00000-of-00001").write_bytes(b"data of step %d" % step)
        store.commit(name, step)
    return store


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
