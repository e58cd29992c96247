"""A new file that repeats an earlier one shares its bytes; one that differs anywhere has bytes of its own."""

from __future__ import annotations

import os

import pytest

from stepguard.disk import files
from stepguard.disk.new_file import NewFile, repeating
from stepguard.saving.commit import Committer
from stepguard.store import CheckpointStore
from stepguard.testing import FakeEngine

SIZE = 3 << 20


@pytest.fixture
def earlier(tmp_path):
    (tmp_path / "earlier").write_bytes(os.urandom(SIZE))
    return tmp_path / "earlier"


def write(path, content, earlier, block=700_000):
    with repeating(lambda _: earlier), NewFile(path) as file:
        for at in range(0, len(content), block):
            file.write(content[at : at + block])
    assert (file.size, file.digest) == files.digest(path)
    assert path.read_bytes() == content
    return path.samefile(earlier) if earlier.exists() else False


def test_what_repeats_it_shares_its_bytes(earlier, tmp_path):
    assert write(tmp_path / "new", earlier.read_bytes(), earlier)
    assert sorted(os.listdir(tmp_path)) == ["earlier", "new"]


@pytest.mark.parametrize("at", [0, 700_000, 1_500_000, SIZE - 1])
def test_what_differs_in_one_byte_does_not(earlier, tmp_path, at):
    content = bytearray(earlier.read_bytes())
    content[at] ^= 1

    assert not write(tmp_path / "new", bytes(content), earlier)


@pytest.mark.parametrize("length", [0, 1, SIZE - 1, SIZE + 1])
def test_what_is_shorter_or_longer_does_not(earlier, tmp_path, length):
    content = (earlier.read_bytes() + b"x")[:length]

    assert not write(tmp_path / "new", content, earlier)


def test_a_small_file_does_not(tmp_path):
    (tmp_path / "earlier").write_bytes(b"x" * 1000)

    assert not write(tmp_path / "new", b"x" * 1000, tmp_path / "earlier")


def test_a_missing_one_or_a_link_is_no_earlier_one(earlier, tmp_path):
    assert not write(tmp_path / "new", earlier.read_bytes(), tmp_path / "missing")
    (tmp_path / "link").symlink_to(earlier)
    content = earlier.read_bytes()
    with repeating(lambda _: tmp_path / "link"), NewFile(tmp_path / "other") as file:
        file.write(content)
    assert not (tmp_path / "other").samefile(earlier)


def test_one_that_is_replaced_meanwhile_is_not_shared(earlier, tmp_path):
    content = earlier.read_bytes()
    with repeating(lambda _: earlier), NewFile(tmp_path / "new") as file:
        file.write(content[:1000])
        earlier.unlink()
        earlier.write_bytes(b"y" * SIZE)
        file.write(content[1000:])

    assert (tmp_path / "new").read_bytes() == content


def test_one_that_is_pruned_meanwhile_is_copied(earlier, tmp_path):
    content = earlier.read_bytes()
    with repeating(lambda _: earlier), NewFile(tmp_path / "new") as file:
        file.write(content[:1000])
        earlier.unlink()
        file.write(content[1000:])

    assert (tmp_path / "new").read_bytes() == content


def test_an_error_leaves_nothing_open(earlier, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), repeating(lambda _: earlier), NewFile(tmp_path / "new") as file:
        file.write(earlier.read_bytes()[:1000])
        raise ZeroDivisionError
    assert len(os.listdir("/proc/self/fd")) == before


class FrozenEngine(FakeEngine):
    """An engine with a part that never changes, and one that does."""

    FROZEN = b"frozen" * 400_000

    def write(self, snapshot, stage, name):
        digests = super().write(snapshot, stage, name)
        for key, content in (("frozen", self.FROZEN), ("moving", b"%d" % snapshot.step * (2 << 20))):
            with NewFile(stage / name / f"{key}.bin") as file:
                file.write(content)
            digests[f"{name}/{key}.bin"] = (file.size, file.digest)
        return digests


def snapshot(step):
    engine = FakeEngine()
    from stepguard.testing.engine import FakeSnapshot

    return FakeSnapshot(step, tuple([step] * engine.size), weight=0.0)


def test_a_part_that_has_not_changed_is_shared_by_checkpoints_each_of_which_is_whole(tmp_path):
    store = CheckpointStore(tmp_path / "run", engine="fake", max_to_keep=2)
    committer = Committer(FrozenEngine(), store)
    for step in (1, 2, 3):
        committer.commit(snapshot(step), 0.0)
        store.prune()

    two, three = (tmp_path / f"run/model.ckpt-{step}" for step in (2, 3))
    assert not (tmp_path / "run/model.ckpt-1").exists()
    assert (two / "frozen.bin").samefile(three / "frozen.bin")
    assert not (two / "moving.bin").samefile(three / "moving.bin")
    assert all(store.verify(one) for one in store.candidates())


def test_a_damaged_part_is_not_shared_but_written(tmp_path):
    store = CheckpointStore(tmp_path / "run", engine="fake")
    committer = Committer(FrozenEngine(), store)
    committer.commit(snapshot(1), 0.0)
    with open(tmp_path / "run/model.ckpt-1/frozen.bin", "r+b") as file:
        file.seek(1_000_000)
        file.write(b"?")
    committer.commit(snapshot(2), 0.0)

    assert store.verify(store.candidates()[0]).step == 2
