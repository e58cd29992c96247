"""``stepguard verify``: damage of every kind is found and named, and what is good is called so."""

import os
import sys

import pytest
from logdirs import commit, flip


@pytest.mark.parametrize("engine", ["tensorflow", "torch"])
def test_a_real_run_is_good(engine, request, stepguard, document):
    logdir = request.getfixturevalue(f"{engine}_run")
    assert stepguard("verify", logdir).exit_code == 0
    assert stepguard("verify", logdir).stdout.splitlines()[-1] == "2 good"
    assert [one["state"] for one in document("verify", logdir)["checkpoints"]] == ["good", "good"]


def test_every_damaged_file_is_named_with_what_is_wrong(tmp_path, stepguard, document):
    commit(tmp_path, 1, 2, 3)
    flip(tmp_path / "model.ckpt-3.data-00000-of-00001")
    os.truncate(tmp_path / "model.ckpt-3.index", 2)
    (tmp_path / "model.ckpt-1.index").unlink()
    shown = stepguard("verify", tmp_path)
    assert shown.exit_code == 1
    assert shown.stdout.splitlines()[-1] == "2 damaged, 1 good"
    newest, middle, oldest = document("verify", tmp_path)["checkpoints"]
    assert {one["file"] for one in newest["damage"]} == {
        str(tmp_path / "model.ckpt-3.data-00000-of-00001"),
        str(tmp_path / "model.ckpt-3.index"),
    }
    assert middle["state"] == "good"
    assert [one["file"] for one in oldest["damage"]] == [str(tmp_path / "model.ckpt-1.index")]
    for one in (*newest["damage"], *oldest["damage"]):
        assert "expected" in one["reason"]
        assert one["reason"] in shown.stdout


@pytest.mark.parametrize("damage", [None, b"", b"mata"])
def test_a_meta_graph_that_differs_is_named_and_its_checkpoint_stays_good(damage, tmp_path, stepguard, document):
    store = commit(tmp_path, 1)
    meta = store.stage("model.ckpt-2") / "model.ckpt-2.meta"
    for suffix, content in ((".index", b"index"), (".data-00000-of-00001", b"data"), (".meta", b"meta")):
        meta.with_suffix(suffix).write_bytes(content)
    store.commit("model.ckpt-2", 2)
    path = tmp_path / meta.name
    path.unlink() if damage is None else path.write_bytes(damage)
    shown = stepguard("verify", tmp_path)
    assert shown.exit_code == 1
    assert shown.stdout.splitlines()[-1] == "2 good"
    assert "can be restored without it" in shown.stdout
    newest = document("verify", tmp_path)["checkpoints"][0]
    assert (newest["state"], [one["file"] for one in newest["damage"]]) == ("good", [str(path)])
    listed = document("ls", tmp_path)["checkpoints"][0]
    assert (listed["state"], listed["next"]) == ("good", True)


@pytest.mark.parametrize("path", ["model.ckpt-2", "model.ckpt-2.index", "model.ckpt-2.manifest.json"])
def test_one_checkpoint_is_known_by_its_prefix_and_by_each_of_its_files(path, tmp_path, stepguard, document):
    commit(tmp_path, 1, 2)
    flip(tmp_path / "model.ckpt-1.index")
    assert stepguard("verify", tmp_path / path).exit_code == 0
    assert [one["name"] for one in document("verify", tmp_path / path)["checkpoints"]] == ["model.ckpt-2"]
    assert stepguard("verify", tmp_path / "model.ckpt-1").exit_code == 1


def test_a_directory_of_pytorch_is_a_checkpoint_and_no_logdir(tmp_path, stepguard):
    commit(tmp_path, 1, saver_files=None)
    assert stepguard("verify", tmp_path / "model.ckpt-1").exit_code == 0
    flip(tmp_path / "model.ckpt-1" / "model.pt")
    assert stepguard("verify", tmp_path / "model.ckpt-1").exit_code == 1


@pytest.mark.parametrize("file", ["model.pt", "__0_0.distcp"])
def test_a_file_in_a_directory_of_pytorch_stands_for_its_checkpoint(file, tmp_path, stepguard, document, monkeypatch):
    commit(tmp_path, 1, 2, saver_files=None)
    path = tmp_path / "model.ckpt-2" / file
    for step in (1, 2):
        (tmp_path / f"model.ckpt-{step}" / "__0_0.distcp").write_bytes(b"beside")
    assert stepguard("verify", path).exit_code == 0
    (found,) = document("verify", path)["checkpoints"]
    assert (found["name"], found["state"], found["path"]) == ("model.ckpt-2", "good", str(tmp_path / "model.ckpt-2"))
    flip(tmp_path / "model.ckpt-2" / "model.pt")
    assert stepguard("verify", path).exit_code == 1
    assert stepguard("verify", tmp_path / "model.ckpt-2" / "other.pt").exit_code == 2
    monkeypatch.chdir(tmp_path / "model.ckpt-1")
    assert stepguard("verify", file).exit_code == 0


def test_an_unfinished_save_is_no_damage_unless_it_is_asked_for(tmp_path, stepguard):
    commit(tmp_path, 1, saver_files=None)
    (tmp_path / "model.ckpt-2").mkdir()
    (tmp_path / "model.ckpt-2" / "model.pt").write_bytes(b"weights")
    assert stepguard("verify", tmp_path).exit_code == 0
    asked_for = stepguard("verify", tmp_path / "model.ckpt-2")
    assert asked_for.exit_code == 1
    assert "incomplete" in asked_for.stdout


def test_nothing_to_verify_and_a_newest_that_is_gone_are_findings(tmp_path, stepguard):
    empty = stepguard("verify", tmp_path)
    assert empty.exit_code == 1
    assert "expected checkpoints, found none" in empty.stdout
    commit(tmp_path, 1, 2)
    assert stepguard("verify", tmp_path).exit_code == 0
    for path in list(tmp_path.glob("model.ckpt-2.*")):
        path.unlink()
    gone = stepguard("verify", tmp_path)
    assert gone.exit_code == 1
    assert "names model.ckpt-2 as the newest" in gone.stdout


def test_a_path_that_is_neither_is_a_mistake_in_the_arguments(tmp_path, stepguard):
    commit(tmp_path, 1)
    wrong = stepguard("verify", tmp_path / "model.ckpt-7")
    assert wrong.exit_code == 2
    assert "neither a logdir nor a checkpoint" in wrong.stderr


def test_without_a_manifest_tensorflow_reads_it_and_finds_what_it_can(tensorflow_run, tmp_path, stepguard, document):
    for path in tensorflow_run.glob("model.ckpt-4.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.ckpt-4.manifest.json").unlink()
    shown = stepguard("verify", tmp_path)
    assert shown.exit_code == 0
    assert "TensorFlow can read every tensor of it" in shown.stdout
    [found] = document("verify", tmp_path)["checkpoints"]
    assert (found["state"], found["readable"]) == ("unverified", True)
    flip(tmp_path / "model.ckpt-4.data-00000-of-00001")
    assert stepguard("verify", tmp_path).exit_code == 1
    [found] = document("verify", tmp_path)["checkpoints"]
    assert (found["state"], found["readable"]) == ("damaged", False)


def test_without_tensorflow_it_says_that_nothing_is_known(tmp_path, stepguard, monkeypatch):
    commit(tmp_path, 1)
    (tmp_path / "model.ckpt-1.manifest.json").unlink()
    monkeypatch.setitem(sys.modules, "stepguard.tensorflow.checkpoint.tensors", None)  # its import fails now
    shown = stepguard("verify", tmp_path)
    assert shown.exit_code == 0
    assert "1 unverified" in shown.stdout
    assert "pip install 'stepguard[tensorflow]'" in shown.stdout


def test_the_current_directory_is_a_logdir_or_a_checkpoint_too(tmp_path, stepguard, monkeypatch):
    commit(tmp_path, 1, saver_files=None)
    monkeypatch.chdir(tmp_path)
    assert stepguard("verify", ".").exit_code == 0
    monkeypatch.chdir(tmp_path / "model.ckpt-1")
    assert stepguard("verify", ".").exit_code == 0
