"""Commands on a logdir that another process writes, replaces and prunes as fast as it can."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
from logdirs import commit

from stepguard.cli.commands import verify
from stepguard.cli.logdir import contents
from stepguard.cli.logdir.contents import commit_id
from stepguard.store import CheckpointStore, recovery, tensorflow_files
from stepguard.store.layout import Layout

WRITER = """
import sys
from stepguard.store import CheckpointStore, tensorflow_files

root, suffix = sys.argv[1], sys.argv[2]
saver_files = tensorflow_files if suffix else None
store = CheckpointStore(root, engine="tensorflow" if suffix else "torch", saver_files=saver_files, max_to_keep=2)
hold = store.acquire()

def save(step):
    name = store.name(step)
    stage = store.stage(name)
    if suffix:
        (stage / f"{name}.index").write_bytes(b"index")
        (stage / f"{name}.data-00000-of-00001").write_bytes(b"data" * (1 + step % 5))
    else:
        (stage / name).mkdir()
        (stage / name / "model.pt").write_bytes(b"weights" * (1 + step % 5))
    store.commit(name, step)
    store.prune()

save(0)
print("first", flush=True)
step = 0
while True:
    step += 1
    save(step)
    if step % 7 == 0:
        save(step)  # replaces it
"""


def test_nothing_is_called_damaged_and_nothing_fails(tmp_path, stepguard, monkeypatch):
    # Between two renames of a commit TensorFlow would be asked to read these files, and they are made up.
    monkeypatch.setitem(sys.modules, "stepguard.tensorflow.checkpoint.tensors", None)
    seen = Counter()
    for suffix in (".index", ""):
        logdir = tmp_path / f"run{suffix}"
        with subprocess.Popen([sys.executable, "-c", WRITER, str(logdir), suffix], stdout=subprocess.PIPE) as writer:
            try:
                assert writer.stdout.readline() == b"first\n"
                until = time.monotonic() + 1
                # On a busy machine there are fewer looks in a second.
                while time.monotonic() < until or min(seen["ls", "good"], seen["verify", "good"]) <= 5:
                    assert time.monotonic() < until + 100, seen
                    for command in ("ls", "verify"):
                        shown = stepguard(command, logdir, "--json")
                        assert shown.exit_code == 0, shown.output
                        found = json.loads(shown.stdout)
                        assert found["missing"] == []
                        for one in found["checkpoints"]:
                            assert one["state"] != "damaged", one
                            seen[command, one["state"]] += 1
                    planned = stepguard("prune", logdir, "--keep-last", 1, "--dry-run")
                    assert planned.exit_code == 0, planned.output
                    refused = stepguard("prune", logdir, "--keep-last", 1)
                    assert (refused.exit_code, "found process" in refused.stderr) == (1, True), refused.output
                assert writer.poll() is None, "the writer has failed"
            finally:
                writer.kill()
    assert seen["ls", "good"] > 5
    assert seen["verify", "good"] > 5


@pytest.fixture
def overtaking(tmp_path):
    """A training that commits a new checkpoint and prunes all others, as often as it is told."""
    steps = itertools.count(1)

    def save():
        step = next(steps)
        commit(tmp_path, step, saver_files=None)
        for manifest in tmp_path.glob("model.ckpt-*.manifest.json"):
            name = manifest.name.partition(".manifest")[0]
            if name != f"model.ckpt-{step}":
                manifest.unlink()
                shutil.rmtree(tmp_path / name)

    save()
    return save


def first_of_all(times, action, function):
    """The function, which does an action before it for so many times."""
    left = iter(range(times))

    def wrapped(*arguments, **options):
        if next(left, None) is not None:
            action()
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_a_training_that_prunes_all_that_was_listed_leaves_no_empty_logdir(
    command, overtaking, tmp_path, stepguard, monkeypatch
):
    def newest_first(layout):
        listed = list(recovery_newest_first(layout))
        prune()
        return iter(listed)

    recovery_newest_first = recovery.newest_first
    prune = first_of_all(20, overtaking, lambda: None)
    monkeypatch.setattr(contents.recovery, "newest_first", newest_first)
    shown = stepguard(command, tmp_path, "--json")
    assert shown.exit_code == 0, shown.output
    assert [one["state"] for one in json.loads(shown.stdout)["checkpoints"]] == ["good"]


def test_a_training_that_prunes_all_that_is_being_read_is_read_again(overtaking, tmp_path, stepguard, monkeypatch):
    monkeypatch.setattr(verify, "read_fully", first_of_all(20, overtaking, verify.read_fully))
    shown = stepguard("verify", tmp_path, "--json")
    assert shown.exit_code == 0, shown.output
    assert [one["state"] for one in json.loads(shown.stdout)["checkpoints"]] == ["good"]


@pytest.mark.parametrize("names", [[], ["run.jsonl", "model.ckpt-3.part"]])
def test_a_logdir_without_checkpoints_is_told_at_once(names, tmp_path, stepguard, monkeypatch):
    for module in (contents, verify):
        monkeypatch.setattr(module, "_LOOK_SECS", 3600.0)
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert stepguard("ls", tmp_path).exit_code == 0
    assert stepguard("verify", tmp_path).exit_code == 1


def test_one_that_was_replaced_while_it_was_read_is_gone_and_not_damaged(tmp_path):
    store = CheckpointStore(tmp_path, engine="torch")
    for _ in range(2):
        stage = store.stage("model.ckpt-3")
        (stage / "model.ckpt-3").mkdir()
        (stage / "model.ckpt-3" / "model.pt").write_bytes(b"weights")
        store.commit("model.ckpt-3", 3)
    # The one before, of which the replacement has removed the half so far.
    kept = tmp_path / ".replaced-model.ckpt-3"
    kept.mkdir()
    (kept / "model.ckpt-3").mkdir()
    shutil.copy(tmp_path / "model.ckpt-3.manifest.json", kept)

    place = Layout(kept, "model.ckpt", tensorflow_files)
    assert commit_id(Layout(tmp_path, "model.ckpt", tensorflow_files), "model.ckpt-3") is not None
    assert commit_id(place, "model.ckpt-3") is None
    (tmp_path / "model.ckpt-3.manifest.json").unlink()
    assert commit_id(place, "model.ckpt-3") is not None
