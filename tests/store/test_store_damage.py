"""Damaged checkpoints and files that cannot be read: what is passed over, moved, or raised."""

from __future__ import annotations

import errno
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
from stores import LAYOUTS, content_of, good_of, layouts, names_in, open_store, save, snapshot_of, tensorflow_content

from stepguard.disk import files
from stepguard.errors import (
    CheckpointCorruptError,
    CheckpointError,
    NoGoodCheckpointError,
)
from stepguard.store import Manifest

# --- damage ---


def damaged_places(size: int) -> list[int]:
    chance = random.Random(size)
    return sorted(chance.sample(range(size), min(50, size)))


def file_names(layout: str) -> list[str]:
    """The files of the checkpoint of step 2 that a restore needs, or that prove it good."""
    needed = [name for name in LAYOUTS[layout][1]("model.ckpt-2", "") if not name.endswith(".meta")]
    return [*needed, "model.ckpt-2.manifest.json"]


@layouts
@pytest.mark.parametrize("number", range(4))
def test_no_flipped_or_truncated_file_is_ever_taken_for_good(layout: str, number: int, tmp_path: Path) -> None:
    names = file_names(layout)
    if number >= len(names):
        return
    store = open_store(tmp_path, layout)
    save(store, 1)
    save(store, 2)
    path = tmp_path / names[number]
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :] for at in damaged_places(len(whole))]
    for broken in [*flipped, *(whole[:size] for size in damaged_places(len(whole))), b"", whole + b"\0"]:
        path.write_bytes(broken)
        good = store.newest_good(quarantine=False).checkpoint
        assert good is not None
        # A flip may hit white space of the manifest and change nothing: what counts is that the content is right.
        assert content_of(good) == LAYOUTS[layout][1](good.name, ""), f"{path}: {broken!r}"
        assert good.step == 1 or names[number].endswith(".manifest.json")


@layouts
@pytest.mark.parametrize("number", range(4))
def test_a_checkpoint_with_a_removed_file_is_not_good_unless_whole_without_it(
    layout: str, number: int, tmp_path: Path
) -> None:
    names = file_names(layout)
    if number >= len(names):
        return
    store = open_store(tmp_path, layout)
    save(store, 1)
    save(store, 2)
    (tmp_path / names[number]).unlink()
    recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert content_of(recovery.checkpoint) == LAYOUTS[layout][1](recovery.checkpoint.name, "")
    if layout == "tensorflow" and names[number].endswith(".manifest.json"):
        # Without its manifest it is a checkpoint as TensorFlow's own tools write it: good if its restore says so.
        assert recovery.checkpoint.step == 2
        assert not recovery.damaged
    else:
        assert recovery.checkpoint.step == 1
        assert "model.ckpt-2" in recovery.message()
        assert "1 step earlier" in recovery.message()


@pytest.mark.parametrize("content", [None, b"", b"mata of model.ckpt-2  " * 10, b"longer than it was" * 100])
def test_a_meta_graph_that_is_missing_or_damaged_is_warned_of_and_no_damage(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    path = tmp_path / "model.ckpt-2.meta"
    if content is None:
        path.unlink()
    else:
        assert content != path.read_bytes()
        path.write_bytes(content)
    recovery = store.newest_good()
    assert (recovery.checkpoint, recovery.damaged) == (store.candidates()[0], ())
    (warning,) = [one.getMessage() for one in caplog.records]
    assert str(path) in warning
    assert "can be restored without it" in warning


def test_a_meta_graph_of_which_the_disk_has_lost_bytes_is_no_damage_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    monkeypatch.setattr(files, "os", os_that_cannot_read(".meta", errno.EIO))
    assert good_of(store).step == 1


def test_damaged_checkpoints_are_moved_with_the_reason_and_reported_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in (100, 200, 300):
        save(store, step)
    (tmp_path / "model.ckpt-300.index").write_bytes(b"short")
    flipped = tmp_path / "model.ckpt-200.data-00000-of-00002"
    flipped.write_bytes(b"X" + flipped.read_bytes()[1:])
    before = snapshot_of(tmp_path)

    recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 100
    assert recovery.steps_lost == 200
    assert [one.checkpoint.step for one in recovery.damaged] == [300, 200]
    message = recovery.message()
    assert "expected a file of" in message
    assert "found 5 bytes" in message
    assert "expected the digest xxh3_128:" in message
    assert f"moved to {tmp_path / 'quarantine' / 'model.ckpt-300'}" in message
    assert message.endswith(f"resuming from {tmp_path / 'model.ckpt-100'}, 200 steps earlier")
    assert "\n" not in message

    after = snapshot_of(tmp_path)
    for step in (200, 300):
        place = f"quarantine/model.ckpt-{step}"
        assert "model.ckpt" in (tmp_path / place / "reason.txt").read_text()
        for name in [*tensorflow_content(f"model.ckpt-{step}", ""), f"model.ckpt-{step}.manifest.json"]:
            assert after[f"{place}/{name}"] == before[name]
            assert name not in after
    # It was said once; the next start finds nothing to complain about.
    assert [one.step for one in store.candidates()] == [100]


def test_a_second_quarantine_of_one_name_gets_its_own_place(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    for _ in range(3):
        save(store, 2)
        (tmp_path / "model.ckpt-2.index").unlink()
        assert good_of(store).step == 1
    assert names_in(tmp_path / "quarantine") == {"model.ckpt-2", "model.ckpt-2.1", "model.ckpt-2.2"}


def test_when_none_is_good_it_refuses_again_and_again_and_moves_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in (1, 2):
        save(store, step)
        (tmp_path / f"model.ckpt-{step}.index").write_bytes(b"bad")
    before = snapshot_of(tmp_path)
    for _ in range(2):
        with pytest.raises(NoGoodCheckpointError, match="to start over from step 0") as caught:
            store.newest_good()
        assert caught.value.path == tmp_path
        assert "model.ckpt-2" in str(caught.value)
    assert snapshot_of(tmp_path) == before


def test_a_manifest_from_a_newer_version_is_an_error_and_no_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    checkpoint = save(store, 2)
    assert checkpoint.manifest is not None
    manifest = checkpoint.manifest
    newer = Manifest(manifest.name, manifest.engine, 2, 1.0, manifest.files, format_version=99)
    (tmp_path / "model.ckpt-2.manifest.json").write_bytes(newer.to_json())
    with pytest.raises(CheckpointError, match="newer Stepguard") as caught:
        store.newest_good()
    assert not isinstance(caught.value, CheckpointCorruptError)
    assert not (tmp_path / "quarantine").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"7", b'"x"', b"{}", b'{"digest": 1}', b"\xff\xfe", b"[" * 100_000, b'{"digest": NaN}'],
)
def test_a_manifest_that_is_no_manifest_is_damage(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorruptError):
        Manifest.from_json(content, tmp_path / "model.ckpt-1.manifest.json")


def test_a_manifest_never_leads_to_files_of_others(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = save(store, 1).manifest
    assert manifest is not None
    with pytest.raises(CheckpointCorruptError, match=r"expected the manifest of model\.ckpt-2"):
        Manifest.from_json(manifest.to_json(), tmp_path / "model.ckpt-2.manifest.json")
    record = manifest.files[0]
    for name in ("../model.ckpt-1.x", "model.ckpt-1/../../x", "model.ckpt-10.index", "/etc/passwd"):
        bad = Manifest("model.ckpt-1", "x", 1, 1.0, (type(record)(name, 1, "d"),))
        with pytest.raises(CheckpointCorruptError, match="only files of"):
            Manifest.from_json(bad.to_json(), tmp_path / "model.ckpt-1.manifest.json")


# --- reading errors ---


def os_that_cannot_read(part: str, number: int) -> Any:
    class Unreadable:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
            if part in str(path) and not flags & os.O_DIRECTORY and Path(path).is_file():
                raise OSError(number, os.strerror(number), str(path))
            return os.open(path, flags, mode)

    return Unreadable()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("part", ["model.ckpt-2.data", "model.ckpt-2.manifest"])
def test_an_error_of_the_process_is_no_damage_and_is_raised(
    number: int, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    before = snapshot_of(tmp_path)
    monkeypatch.setattr(files, "os", os_that_cannot_read(part, number))
    with pytest.raises(OSError, match=r"model\.ckpt-2") as caught:
        store.newest_good()
    assert caught.value.errno == number
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize(
    "number",
    [errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ELOOP, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENXIO],
)
@pytest.mark.parametrize("part", ["model.ckpt-2.data", "model.ckpt-2.manifest"])
def test_a_file_that_the_system_cannot_read_is_damage_when_others_can_be_read(
    number: int, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    monkeypatch.setattr(files, "os", os_that_cannot_read(part, number))
    recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 1
    assert "could not be read" in recovery.message()
    assert (tmp_path / "quarantine" / "model.ckpt-2").is_dir()


def test_when_nothing_can_be_read_the_error_is_raised_and_nothing_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    before = snapshot_of(tmp_path)
    monkeypatch.setattr(files, "os", os_that_cannot_read("model.ckpt-", errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        store.newest_good()
    assert snapshot_of(tmp_path) == before


def test_in_a_read_only_logdir_the_damaged_stay_and_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / "model.ckpt-2.index").write_bytes(b"bad")
    before = snapshot_of(tmp_path)

    class ReadOnly:
        def __getattr__(self, name: str) -> Any:
            if name in ("mkdir", "replace", "unlink", "rmdir", "link"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))
            return getattr(os, name)

    monkeypatch.setattr(files, "os", ReadOnly())
    with caplog.at_level(logging.WARNING):
        recovery = store.newest_good()
    assert recovery.checkpoint is not None
    assert recovery.checkpoint.step == 1
    assert "left where it is" in recovery.message()
    assert "Read-only file system" in caplog.text
    assert snapshot_of(tmp_path) == before


def test_one_that_is_pruned_while_it_is_read_is_passed_over_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chief = open_store(tmp_path, max_to_keep=1)
    save(chief, 1)
    reader = open_store(tmp_path)
    listed = reader.candidates()
    save(chief, 2)
    chief.prune()
    rounds = iter([listed, reader.candidates()])
    monkeypatch.setattr(reader._layout, "candidates", lambda: next(rounds))
    recovery = reader.newest_good(quarantine=False)
    assert recovery.checkpoint is not None
    assert (recovery.checkpoint.step, recovery.damaged) == (2, ())
