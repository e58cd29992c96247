"""``stepguard prune``: what it keeps, what it refuses, and what is left in the logdir."""

import os
import subprocess
import sys

import pytest
from logdirs import commit, flip

from stepguard.store import statefile, tensorflow_files


def kept(logdir, basename="model.ckpt"):
    return sorted(int(path.name.split("-")[1].split(".")[0]) for path in logdir.glob(f"{basename}-*.manifest.json"))


def everything(logdir):
    return {str(path): path.stat().st_mtime_ns for path in logdir.rglob("*")}


@pytest.mark.parametrize("saver_files", [tensorflow_files, None], ids=["tensorflow", "torch"])
def test_the_last_and_the_multiples_are_kept_and_nothing_else(saver_files, tmp_path, stepguard, document):
    commit(tmp_path, 10, 20, 30, 40, 50, 60, saver_files=saver_files)
    pruned = stepguard("prune", tmp_path, "--keep-last", 2, "--keep-every", 20)
    assert pruned.exit_code == 0
    assert kept(tmp_path) == [20, 40, 50, 60]
    left = {path.name for path in tmp_path.iterdir() if "model.ckpt-" in path.name}
    assert {name.split("-")[1].split(".")[0] for name in left} == {"20", "40", "50", "60"}
    assert "removed  model.ckpt-30\n" in pruned.stdout
    assert "2 removed" in pruned.stdout
    assert {one["state"] for one in document("ls", tmp_path)["checkpoints"]} == {"good"}


def test_the_state_file_names_what_is_left(tmp_path, stepguard):
    commit(tmp_path, 1, 2, 3)
    statefile.write(tmp_path, "model.ckpt-3", ["model.ckpt-1", "model.ckpt-2", "model.ckpt-3"], last_preserved=7.0)
    stepguard("prune", tmp_path, "--keep-last", 1)
    state = statefile.read(tmp_path)
    assert (state.newest, state.names, state.last_preserved) == ("model.ckpt-3", ("model.ckpt-3",), 7.0)
    assert state.path.is_absolute()


def test_relative_paths_in_the_state_file_stay_relative(tmp_path, stepguard):
    commit(tmp_path, 1, 2)
    names = ["model.ckpt-1", "model.ckpt-2"]
    statefile.write(tmp_path, "model.ckpt-2", names, relative_paths=True)
    stepguard("prune", tmp_path, "--keep-last", 1)
    state = statefile.read(tmp_path)
    assert (str(state.path), state.names) == ("model.ckpt-2", ("model.ckpt-2",))


def test_a_dry_run_says_the_same_and_changes_nothing(tmp_path, stepguard, document):
    commit(tmp_path, 1, 2, 3)
    before = everything(tmp_path)
    shown = stepguard("prune", tmp_path, "--keep-last", 1, "--dry-run")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("would remove  model.ckpt-2\nwould remove  model.ckpt-1\n")
    planned = document("prune", tmp_path, "--keep-last", 1, "--dry-run")
    assert everything(tmp_path) == before
    done = document("prune", tmp_path, "--keep-last", 1)
    assert planned == {**done, "dry_run": True}
    assert done["removed"] == ["model.ckpt-2", "model.ckpt-1"]
    assert done["newest_good"] == ["model.ckpt-3"]
    assert kept(tmp_path) == [3]


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_newest_one_does_not_count_and_the_newest_good_one_stays(damage, tmp_path, stepguard, document):
    commit(tmp_path, 1, 2, 3, 4)
    data = tmp_path / "model.ckpt-4.data-00000-of-00001"
    flip(data) if damage == "flipped" else os.truncate(data, 3)
    done = document("prune", tmp_path, "--keep-last", 1)
    assert done["newest_good"] == done["kept"] == ["model.ckpt-3"]
    assert done["damaged"] == ["model.ckpt-4"]
    assert kept(tmp_path) == [3, 4]
    assert stepguard("prune", tmp_path, "--keep-every", 1000).exit_code == 0
    assert kept(tmp_path) == [3, 4]


def test_nothing_newer_than_the_newest_proven_good_one_goes(tmp_path, stepguard, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "stepguard.tensorflow.checkpoint.tensors", None
    )  # as if TensorFlow were not installed
    commit(tmp_path, 1, 2, 3)
    (tmp_path / "model.ckpt-3.manifest.json").unlink()
    stepguard("prune", tmp_path, "--keep-every", 1000)
    assert kept(tmp_path) == [2]
    assert (tmp_path / "model.ckpt-3.index").exists()


def test_where_nothing_is_good_nothing_is_removed(tmp_path, stepguard):
    commit(tmp_path, 1, 2, 3)
    for path in tmp_path.glob("*.data-*"):
        flip(path)
    before = everything(tmp_path)
    refused = stepguard("prune", tmp_path, "--keep-last", 1)
    assert refused.exit_code == 1
    assert "expected a good checkpoint" in refused.stderr
    assert {**everything(tmp_path), str(tmp_path / ".stepguard.lock"): 0} == {
        **before,
        str(tmp_path / ".stepguard.lock"): 0,
    }


def test_it_refuses_while_another_process_holds_the_logdir_and_names_it(tmp_path, stepguard):
    commit(tmp_path, 1, 2)
    program = (
        "import sys\n"
        "from stepguard.store import CheckpointStore\n"
        "hold = CheckpointStore(sys.argv[1]).acquire()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = stepguard("prune", tmp_path, "--keep-last", 1)
        allowed = stepguard("prune", tmp_path, "--keep-last", 1, "--dry-run")
        holder.stdin.close()
    assert refused.exit_code == 1
    assert f"process {holder.pid} on {os.uname().nodename}" in refused.stderr
    assert allowed.exit_code == 0
    assert kept(tmp_path) == [1, 2]
    assert stepguard("prune", tmp_path, "--keep-last", 1).exit_code == 0
    assert kept(tmp_path) == [2]


def test_basenames_are_counted_apart(tmp_path, stepguard):
    commit(tmp_path, 1, 2, 3)
    commit(tmp_path, 1, 2, basename="best")
    stepguard("prune", tmp_path, "--keep-last", 1)
    assert kept(tmp_path) == [3]
    assert kept(tmp_path, "best") == [2]


def test_what_is_to_be_kept_has_to_be_said(tmp_path, stepguard):
    commit(tmp_path, 1, 2)
    assert stepguard("prune", tmp_path).exit_code == 2
    assert stepguard("prune", tmp_path, "--keep-last", 0).exit_code == 2
    assert kept(tmp_path) == [1, 2]


def test_a_real_run_goes_on_after_it(torch_run, tmp_path, stepguard, document):
    import shutil

    logdir = tmp_path / "copy"
    shutil.copytree(torch_run, logdir)
    assert stepguard("prune", logdir, "--keep-last", 1).exit_code == 0
    assert [one["step"] for one in document("verify", logdir)["checkpoints"]] == [4]
    assert stepguard("verify", logdir).exit_code == 0


def test_the_store_itself_never_removes_the_newest_good_one(tmp_path):
    store = commit(tmp_path, 1, 2)
    newest, oldest = store.candidates()
    with pytest.raises(ValueError, match="the newest good checkpoint is never removed"):
        store.remove([oldest, newest], newest_good=newest)
    assert kept(tmp_path) == [1, 2]
