"""Durable files: what is written whole, what is fsynced, and what an error leaves."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import xxhash

from stepguard.disk import files, new_file
from stepguard.disk.new_file import NewFile


class OsWith:
    """The real ``os``, with some functions replaced."""

    def __init__(self, **replaced: Any) -> None:
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(os, name)


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_write_atomic_creates_and_replaces(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "state", b"old")
    files.write_atomic(tmp_path / "state", b"new and longer")
    assert (tmp_path / "state").read_bytes() == b"new and longer"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_failed_write_atomic_keeps_the_old_file_and_leaves_no_other(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_atomic(tmp_path / "state", b"old")
    monkeypatch.setattr(files, "os", OsWith(**{call: failing(errno.ENOSPC)}))
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_atomic(tmp_path / "state", b"new")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "state").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "os", OsWith(write=lambda descriptor, view: os.write(descriptor, view[:3])))
    files.write_durable(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_filesystem_without_fsync_of_directories_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "os", OsWith(fsync=failing(errno.EINVAL)))
    files.fsync_dir(tmp_path)


def test_a_directory_whose_fsync_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "os", OsWith(fsync=failing(errno.EIO)))
    with pytest.raises(OSError, match="Input/output"):
        files.fsync_dir(tmp_path)


def test_fsync_tree_reaches_every_file_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "top" / "inner").mkdir(parents=True)
    (tmp_path / "top" / "a").write_bytes(b"a")
    (tmp_path / "top" / "inner" / "b").write_bytes(b"b")
    reached = set()
    monkeypatch.setattr(
        files, "os", OsWith(fsync=lambda descriptor: reached.add(os.readlink(f"/proc/self/fd/{descriptor}")))
    )
    files.fsync_tree(tmp_path / "top")
    top = os.path.realpath(tmp_path / "top")
    assert reached == {top, f"{top}/a", f"{top}/inner", f"{top}/inner/b"}


def test_make_dirs_creates_what_is_missing_and_refuses_a_file(tmp_path: Path) -> None:
    files.make_dirs(tmp_path / "a" / "b")
    files.make_dirs(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileExistsError, match="file"):
            files.make_dirs(path)


def test_remove_takes_files_trees_links_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "file").write_bytes(b"x")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("tree", "link", "missing"):
        files.remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "file").exists()


@pytest.mark.parametrize("has_links", [True, False])
def test_link_tree_gives_a_second_name_that_outlives_the_first(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_links:
        monkeypatch.setattr(files, "os", OsWith(link=failing(errno.EPERM)))
    (tmp_path / "old" / "inner").mkdir(parents=True)
    (tmp_path / "old" / "inner" / "file").write_bytes(b"x" * 3_000_000)
    files.link_tree(tmp_path / "old", tmp_path / "second")
    files.remove(tmp_path / "old")
    assert (tmp_path / "second" / "inner" / "file").read_bytes() == b"x" * 3_000_000


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_500_000])
def test_digest_is_that_of_the_whole_content(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert files.digest(tmp_path / "file") == (size, "xxh3_128:" + xxhash.xxh3_128_hexdigest(content))
    assert files.digest_bytes(content) == files.digest(tmp_path / "file")[1]
    assert files.read_bytes(tmp_path / "file") == content


def test_no_descriptor_is_left_open_by_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    fault = failing(errno.EIO)
    monkeypatch.setattr(files, "os", OsWith(fsync=fault, read=fault, readv=fault, write=fault))
    for call in (files.fsync_file, files.fsync_dir, files.digest, files.read_bytes):
        with pytest.raises(OSError, match="Input/output"):
            call(tmp_path / "file" if call is not files.fsync_dir else tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        files.write_durable(tmp_path / "other", b"x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_large_file_goes_to_the_disk_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    began = threading.Event()

    def fdatasync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        began.set()

    monkeypatch.setattr(new_file, "_WRITEBACK_BYTES", 100)
    monkeypatch.setattr(new_file, "os", OsWith(fdatasync=fdatasync))
    content = os.urandom(1000)
    with NewFile(tmp_path / "file") as file:
        for begin in range(0, 1000, 50):
            file.write(content[begin : begin + 50])
            if file.size >= 100:
                assert began.wait(60)
    assert synced[0] < 1000
    assert (tmp_path / "file").read_bytes() == content
    assert (file.size, file.digest) == files.digest(tmp_path / "file")


def test_a_file_is_written_where_no_thread_can_be_started(tmp_path, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(new_file, "_WRITEBACK_BYTES", 100)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with NewFile(tmp_path / "file") as file:
        for _ in range(3):
            file.write(b"x" * 100)
    assert (tmp_path / "file").read_bytes() == b"x" * 300


@pytest.mark.parametrize("blocks", [1, 3])
def test_what_the_disk_answers_to_that_is_raised(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_file, "_WRITEBACK_BYTES", 100)
    monkeypatch.setattr(new_file, "os", OsWith(fdatasync=failing(errno.EIO)))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output"), NewFile(tmp_path / "file") as file:
        for _ in range(blocks):
            file.write(b"x" * 200)
    assert len(os.listdir("/proc/self/fd")) == before
