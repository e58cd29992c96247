"""The checkpoints in a mirror: sent whole or not at all, fetched only when they are what was sent, kept by number."""

from __future__ import annotations

import os

import faults
import mirrors
import pytest

from stepguard.errors import CheckpointCorruptError
from stepguard.remote.objects import RemoteError
from stepguard.remote.pace import Pace, StoppedError
from stepguard.store.manifest import SUFFIX

LARGE = 9 << 20


@pytest.fixture
def copies(url):
    return mirrors.copies(url)


@pytest.fixture
def saved(tmp_path):
    """A logdir with one checkpoint, and its manifest."""

    def saved(step=1, **content):
        store = mirrors.checkpoint_in(tmp_path / "run", step, content or {"a": b"first", "b/c": b"second"})
        return store, store.read_manifest(store.candidates()[0])

    return saved


def test_a_copy_has_the_names_and_the_bytes_of_the_logdir(copies, saved, tmp_path):
    store, manifest = saved()
    copies.send(store.root, manifest)

    assert [one.name for one in copies.listed()] == ["model.ckpt-1"]
    assert copies.manifest("model.ckpt-1") == manifest
    fetched = copies.fetch(manifest, tmp_path / "there")
    assert fetched == {one.name: (one.size, one.digest) for one in manifest.files}
    assert (tmp_path / "there/model.ckpt-1/b/c").read_bytes() == b"second"


def test_a_mirror_in_a_directory_is_a_logdir(saved, tmp_path):
    store, manifest = saved()
    mirrors.copies(str(tmp_path / "mirror")).send(store.root, manifest)

    there = mirrors.CheckpointStore(tmp_path / "mirror", engine="fake")
    assert there.newest_good().checkpoint.manifest == manifest


def test_the_manifest_is_written_last(copies, saved, monkeypatch):
    store, manifest = saved()
    keys = []
    write, put = copies.remote.write, copies.remote.put
    monkeypatch.setattr(copies.remote, "write", lambda key, *rest: (keys.append(key), write(key, *rest))[1])
    monkeypatch.setattr(copies.remote, "put", lambda key, content: (keys.append(key), put(key, content))[1])
    copies.send(store.root, manifest)

    assert keys == ["model.ckpt-1/a", "model.ckpt-1/b/c", "model.ckpt-1" + SUFFIX]


def test_a_file_that_is_damaged_here_never_appears_there(copies, saved):
    store, manifest = saved(large=os.urandom(LARGE))
    path = store.root / "model.ckpt-1/large"
    with open(path, "r+b") as file:
        file.seek(LARGE - 5)
        file.write(b"?")

    with pytest.raises(CheckpointCorruptError) as raised:
        copies.send(store.root, manifest)
    assert raised.value.path == path
    assert copies.remote.objects() == []


def test_a_checkpoint_that_is_pruned_while_it_is_sent_arrives_whole(copies, saved, monkeypatch):
    store, manifest = saved()
    write = copies.remote.write

    def prune_then_write(*arguments):
        mirrors.files_gone(store.root)
        return write(*arguments)

    monkeypatch.setattr(copies.remote, "write", prune_then_write)
    copies.send(store.root, manifest)

    assert copies.damages(copies.listed()[0], manifest, reads=True) == []


def test_what_has_not_changed_is_copied_in_the_place(copies, saved, monkeypatch):
    store, before = saved(frozen=b"x" * 5000, head=b"1")
    copies.send(store.root, before)
    store, manifest = saved(2, frozen=b"x" * 5000, head=b"2")
    sent = copies.send(store.root, manifest, before)

    assert sent == 1
    copies.remove([one for one in copies.listed() if one.name == "model.ckpt-1"])
    assert copies.damages(copies.listed()[0], manifest, reads=True) == []


def test_what_is_too_short_missing_or_wrong_is_found(copies, saved):
    store, manifest = saved()
    copies.send(store.root, manifest)
    copies.remote.put("model.ckpt-1/a", b"f")
    copies.remote.put("model.ckpt-1/b/c", b"SECOND")

    by_size = copies.damages(copies.listed()[0], manifest, reads=False)
    by_reading = copies.damages(copies.listed()[0], manifest, reads=True)
    copies.remote.delete(["model.ckpt-1/a"])
    of_missing = copies.damages(copies.listed()[0], manifest, reads=False)

    assert [(one.name, why[:40]) for one, why in by_size] == [
        ("model.ckpt-1/a", "expected an object of 5 bytes, found 1 b")
    ]
    assert [one.name for one, _ in by_reading] == ["model.ckpt-1/a", "model.ckpt-1/b/c"]
    assert of_missing[0][1] == "expected an object of 5 bytes, found none"


def test_what_is_wrong_there_is_not_fetched(copies, saved, tmp_path):
    store, manifest = saved()
    copies.send(store.root, manifest)
    copies.remote.put("model.ckpt-1/a", b"FIRST")

    with pytest.raises(CheckpointCorruptError, match=r"model\.ckpt-1/a: expected 5 bytes"):
        copies.fetch(manifest, tmp_path / "there")
    assert not (tmp_path / "there/model.ckpt-1/a").exists()


def test_a_manifest_that_names_files_of_others_is_refused(copies, saved):
    store, manifest = saved()
    copies.send(store.root, manifest)
    content = manifest.to_json().replace(b"model.ckpt-1/a", b"../../etc/pwd")
    copies.remote.put("model.ckpt-1" + SUFFIX, content)

    with pytest.raises(CheckpointCorruptError):
        copies.manifest("model.ckpt-1")


def test_a_run_that_went_back_goes_on_from_what_the_state_file_names(copies, saved):
    for step in (900, 500):
        store, _manifest = saved(step)
        copies.send(store.root, store.read_manifest(next(one for one in store.candidates() if one.step == step)))
        if step == 900:
            mirrors.pass_a_tick(copies)

    assert copies.listed()[0].step == 900
    copies.state("model.ckpt-500", ["model.ckpt-500"])
    assert copies.listed()[0].step == 500


def test_what_a_cut_upload_has_left_is_swept_and_nothing_else(copies, saved):
    store, manifest = saved()
    copies.send(store.root, manifest)
    for key in ("model.ckpt-7/a", "model.ckpt-7.index", "notes.txt", "run.jsonl", "traces/chief.trace"):
        copies.remote.put(key, b"x")

    assert copies.sweep() == ["model.ckpt-7.index", "model.ckpt-7/a"]
    kept = [one.key for one in copies.remote.objects()]
    assert kept == [
        "model.ckpt-1" + SUFFIX,
        *("model.ckpt-1/a", "model.ckpt-1/b/c", "notes.txt", "run.jsonl", "traces/chief.trace"),
    ]


class TestInABadNetwork:
    @pytest.fixture
    def url(self, network):
        return "s3://bucket/runs/x"

    def test_bytes_that_change_on_the_way_are_never_committed(self, copies, saved, network):
        store, manifest = saved()
        network.fails(faults.only("PUT", "/a", lambda handler, body: b"0" + body[1:]))

        with pytest.raises(RemoteError):
            copies.send(store.root, manifest)
        assert copies.listed() == []
        network.fails(None)
        copies.send(store.root, manifest)
        assert copies.damages(copies.listed()[0], manifest, reads=True) == []

    def test_a_try_after_a_cut_sends_only_what_is_not_there(self, copies, saved, network):
        store, manifest = saved(a=b"1" * 1000, b=b"2" * 1000)
        network.fails(faults.only("PUT", "-1/b", faults.broken))
        with pytest.raises(RemoteError):
            copies.send(store.root, manifest)
        network.fails(None)
        network.requests.clear()
        copies.send(store.root, manifest)

        assert [path.rpartition("/")[2] for verb, path, _ in network.requests if verb == "PUT"] == [
            "b",
            "model.ckpt-1" + SUFFIX,
        ]

    def test_bytes_that_change_on_their_way_back_are_read_again(self, copies, saved, network, tmp_path):
        store, manifest = saved()
        copies.send(store.root, manifest)
        left = [1]

        def change(handler, content):
            if handler.command == "GET" and handler.path.endswith("/a") and left[0]:
                left[0] = 0
                return b"0" + content[1:]
            return content

        network.answers(change)
        copies.fetch(manifest, tmp_path / "there")

        assert (tmp_path / "there/model.ckpt-1/a").read_bytes() == b"first"


class TestTheBoundOnBandwidth:
    def test_is_kept(self):
        pace = Pace(1 << 20)
        began = mirrors.time.monotonic()
        for _ in range(4):
            pace.take(1 << 18)

        assert 0.7 < mirrors.time.monotonic() - began < 60

    def test_ends_at_once_when_the_run_does(self):
        pace = Pace(1.0)
        pace.take(1000)
        pace.stop()

        with pytest.raises(StoppedError):
            pace.take(1)
