"""How often the store lists its directory: not once for each of thousands of checkpoints."""

import os

import pytest

from stepguard.disk import files
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.store.layout import Layout


def commit(root, steps, saver_files):
    store = CheckpointStore(root, saver_files=saver_files, max_to_keep=1)
    for step in steps:
        name = store.name(step)
        stage = store.stage(name)
        (stage / f"{name}.index").write_bytes(b"index")
        (stage / f"{name}.data-00000-of-00001").write_bytes(b"data")
        store.commit(name, step)
    return store


@pytest.fixture
def listings(monkeypatch):
    """One entry for each listing of a directory."""
    found = []
    entries = Layout.entries

    def counted(layout):
        found.append(layout.root)
        return entries(layout)

    monkeypatch.setattr(Layout, "entries", counted)
    monkeypatch.setattr(files, "fsync_dir", lambda path: None)
    return found


def let_rest(root):
    """As if nothing had changed in the directory for a while."""
    os.utime(root, (1e9, 1e9))


@pytest.mark.parametrize("count", [5, 20])
def test_a_search_through_many_damaged_ones_lists_the_directory_a_few_times(tmp_path, listings, count):
    store = commit(tmp_path, range(1, count + 1), tensorflow_files)
    for step in range(2, count + 1):
        (tmp_path / f"model.ckpt-{step}.manifest.json").write_bytes(b"{")
    let_rest(tmp_path)
    listings.clear()
    assert store.newest_good(quarantine=False).checkpoint.step == 1
    assert len(listings) <= 3


@pytest.mark.parametrize("count", [5, 20])
def test_pruning_many_lists_the_directory_a_few_times(tmp_path, listings, count):
    store = commit(tmp_path, range(1, count + 1), tensorflow_files)
    listings.clear()
    assert len(store.prune()) == count - 1
    assert len(listings) <= 3
    assert sorted(one.name for one in tmp_path.iterdir() if one.name != "checkpoint") == [
        f"model.ckpt-{count}{suffix}" for suffix in (".data-00000-of-00001", ".index", ".manifest.json")
    ]


def test_what_has_changed_since_a_listing_is_seen(tmp_path):
    commit(tmp_path, [1], tensorflow_files)
    layout = Layout(tmp_path, "model.ckpt", tensorflow_files)
    let_rest(tmp_path)
    assert "model.ckpt-1.meta" not in layout.present("model.ckpt-1")
    (tmp_path / "model.ckpt-1.meta").write_bytes(b"meta")
    assert "model.ckpt-1.meta" in layout.present("model.ckpt-1")
    # Also when it changes again within the tick of the file system's clock.
    status = os.stat(tmp_path)
    (tmp_path / "model.ckpt-1.meta").unlink()
    os.utime(tmp_path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "model.ckpt-1.meta" not in layout.present("model.ckpt-1")
