"""``stepguard ls`` on logdirs that are whole, damaged, unfinished, empty, large, or full of odd names."""

import json
import os
import subprocess
import sys
import time

import pytest
from logdirs import commit

from stepguard.disk import files
from stepguard.store import FileRecord, Manifest, tensorflow_files


def states(found):
    return {one["name"]: one["state"] for one in found["checkpoints"]}


def next_ones(found):
    return [one["name"] for one in found["checkpoints"] if one["next"]]


@pytest.mark.parametrize("engine", ["tensorflow", "torch"])
def test_a_real_run_is_listed_from_newest_to_oldest(engine, request, document):
    logdir = request.getfixturevalue(f"{engine}_run")
    found = document("ls", logdir)
    assert [(one["step"], one["state"], one["engine"]) for one in found["checkpoints"]] == [
        (4, "good", engine),
        (2, "good", engine),
    ]
    assert next_ones(found) == ["model.ckpt-4"]
    newest = found["checkpoints"][0]
    assert newest["path"] == str(logdir / "model.ckpt-4")
    assert newest["bytes"] > 100
    assert 0 <= newest["age_secs"] < 3600
    assert abs(newest["time"] + newest["age_secs"] - time.time()) < 60


def test_the_table_marks_the_one_that_a_restart_would_take(tmp_path, stepguard):
    commit(tmp_path, 100, 200)
    title, newest, oldest = stepguard("ls", tmp_path).stdout.splitlines()
    assert title.split() == ["STEP", "AGE", "SIZE", "ENGINE", "STATE", "NAME"]
    assert newest.startswith(">  ")
    assert newest.split()[-3:] == ["tensorflow", "good", "model.ckpt-200"]
    assert oldest.split()[-1] == "model.ckpt-100"
    assert ">" not in oldest


@pytest.mark.parametrize("saver_files", [tensorflow_files, None], ids=["tensorflow", "torch"])
@pytest.mark.parametrize("damage", ["cut", "missing", "manifest cut", "manifest of another"])
def test_damage_that_shows_without_reading_the_data_is_named_and_passed_over(damage, saver_files, tmp_path, document):
    commit(tmp_path, 1, 2, saver_files=saver_files)
    data = tmp_path / ("model.ckpt-2/model.pt" if saver_files is None else "model.ckpt-2.data-00000-of-00001")
    manifest = tmp_path / "model.ckpt-2.manifest.json"
    if damage == "cut":
        os.truncate(data, 3)
    elif damage == "missing":
        data.unlink()
    elif damage == "manifest cut":
        os.truncate(manifest, 50)
    else:
        manifest.write_bytes((tmp_path / "model.ckpt-1.manifest.json").read_bytes())
    found = document("ls", tmp_path)
    assert states(found) == {"model.ckpt-2": "damaged", "model.ckpt-1": "good"}
    assert next_ones(found) == ["model.ckpt-1"]
    guilty = manifest if damage.startswith("manifest") else data
    assert any(str(guilty) in reason for reason in found["checkpoints"][0]["reasons"])


def test_a_checkpoint_of_tensorflows_own_tools_is_unverified_and_may_be_taken(tmp_path, document):
    commit(tmp_path, 1)
    (tmp_path / "model.ckpt-1.manifest.json").unlink()
    found = document("ls", tmp_path)
    assert states(found) == {"model.ckpt-1": "unverified"}
    assert next_ones(found) == ["model.ckpt-1"]
    (tmp_path / "model.ckpt-1.data-00000-of-00001").unlink()
    found = document("ls", tmp_path)
    assert states(found) == {"model.ckpt-1": "damaged"}
    assert next_ones(found) == []


def test_what_no_commit_record_vouches_for_is_incomplete(tmp_path, document):
    store = commit(tmp_path, 1)
    (store.stage("model.ckpt-2") / "model.ckpt-2.index").write_bytes(b"index")
    (tmp_path / "model.ckpt-3.data-00000-of-00001").write_bytes(b"data")
    (tmp_path / "model.ckpt-4").mkdir()
    (tmp_path / "model.ckpt-4" / "model.pt").write_bytes(b"weights")
    (tmp_path / ".pruned-model.ckpt-0").write_bytes(b"{}")
    found = document("ls", tmp_path)
    assert states(found) == {
        "model.ckpt-4": "incomplete",
        "model.ckpt-3": "incomplete",
        "model.ckpt-2": "incomplete",
        "model.ckpt-0": "incomplete",
        "model.ckpt-1": "good",
    }
    assert next_ones(found) == ["model.ckpt-1"]


def test_one_that_is_just_being_replaced_is_listed_as_it_was_before(tmp_path, document):
    commit(tmp_path, 1)
    aside = tmp_path / ".replaced-model.ckpt-1"
    aside.mkdir()
    for path in list(tmp_path.glob("model.ckpt-1.*")):
        path.rename(aside / path.name)
    found = document("ls", tmp_path)
    assert states(found) == {"model.ckpt-1": "good"}
    assert found["checkpoints"][0]["path"] == str(aside / "model.ckpt-1")


def test_a_program_that_went_back_goes_on_from_there(tmp_path, document):
    commit(tmp_path, 100, 50)
    assert next_ones(document("ls", tmp_path)) == ["model.ckpt-50"]


def test_each_basename_has_one_that_its_program_would_take(tmp_path, document):
    commit(tmp_path, 1, 2)
    commit(tmp_path, 7, basename="best")
    assert sorted(next_ones(document("ls", tmp_path))) == ["best-7", "model.ckpt-2"]


def test_a_newest_checkpoint_that_is_gone_and_what_lies_in_quarantine_are_told(tmp_path, stepguard, document):
    store = commit(tmp_path, 1, 2)
    store.quarantine(store.candidates()[0], "for the test")
    found = document("ls", tmp_path)
    assert found["missing"] == ["model.ckpt-2"]
    assert found["quarantined"] == 1
    shown = stepguard("ls", tmp_path).stdout
    assert "names model.ckpt-2 as the newest, and there is no file of it" in shown
    assert "1 damaged checkpoint in quarantine/" in shown


def test_an_empty_logdir_has_no_checkpoints(tmp_path, stepguard, document):
    shown = stepguard("ls", tmp_path)
    assert shown.exit_code == 0
    assert shown.stdout == f"{tmp_path}: no checkpoints\n"
    assert document("ls", tmp_path)["checkpoints"] == []


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    for step in range(10_000):
        name = f"model.ckpt-{step}"
        (root / f"{name}.index").write_bytes(b"index")
        manifest = Manifest(name, "tensorflow", step, 1e9 + step, (FileRecord(f"{name}.index", 5, "xxh3_128:0"),))
        (root / f"{name}.manifest.json").write_bytes(manifest.to_json())
    return root


def test_ten_thousand_checkpoints_are_listed(ten_thousand, document):
    found = document("ls", ten_thousand)
    assert [one["step"] for one in found["checkpoints"]] == list(range(9_999, -1, -1))
    assert {one["state"] for one in found["checkpoints"]} == {"good"}


def test_a_reader_that_goes_away_ends_it_quietly(ten_thousand):
    # Unbuffered, Python itself loses what a pipe takes no more, and says nothing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-m", "stepguard", "ls", str(ten_thousand)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as listing:
        assert b"STEP" in listing.stdout.readline()
        listing.stdout.close()
        assert listing.stderr.read() == b""
        assert listing.wait(60) == 141


def test_piped_names_are_whole_and_without_colours(tmp_path):
    basename = "a_name_that_is_longer_than_a_terminal_is_wide_" * 3
    commit(tmp_path, 1, basename=basename)
    listed = subprocess.run(
        [sys.executable, "-m", "stepguard", "ls", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert f"{basename}-1\n" in listed.stdout
    assert "\x1b" not in listed.stdout


def test_names_that_are_no_text_are_shown_as_escapes(tmp_path, stepguard, document):
    strange = os.fsdecode(b"caf\xe9")
    for suffix in (".index", ".data-00000-of-00001"):
        (tmp_path / f"{strange}-1{suffix}").write_bytes(b"content")
    commit(tmp_path, 1, basename="two\nlines")
    (tmp_path / "nötig-7.index").write_bytes(b"")
    shown = stepguard("ls", tmp_path)
    assert shown.exit_code == 0
    assert "caf\\xe9-1\n" in shown.stdout
    assert "two\\nlines-1\n" in shown.stdout
    assert "nötig-7\n" in shown.stdout
    assert json.loads(stepguard("ls", tmp_path, "--json").stdout)
    assert len(document("ls", tmp_path)["checkpoints"]) == 3


@pytest.mark.parametrize("saver_files", [tensorflow_files, None], ids=["tensorflow", "torch"])
@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_save_whose_last_renames_a_kill_has_prevented_is_the_next_one(
    is_whole, moved, saver_files, tmp_path, document, monkeypatch
):
    store = commit(tmp_path, 1, saver_files=saver_files)
    move, moves = files.move, iter(range(100))

    def killed(source, target):
        if next(moves) == moved:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "move", killed)
        patch.setattr(files, "remove", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            commit(tmp_path, 2, saver_files=saver_files)
    if not is_whole:
        os.truncate(next(one for one in tmp_path.rglob("*") if one.is_file() and b"step 2" in one.read_bytes()), 1)
    found = document("ls", tmp_path)
    assert next_ones(found) == ["model.ckpt-2" if is_whole else "model.ckpt-1"]
    # As a chief does it.
    store.sweep()
    assert store.newest_good().checkpoint.step == (2 if is_whole else 1)


def test_many_runs_have_a_line_each_with_what_a_restart_would_take(tmp_path, stepguard, document):
    store = commit(tmp_path / "b", 1, 5, 12, saver_files=None)
    commit(tmp_path / "deep" / "a", 3, saver_files=None)
    store.quarantine(store.candidates()[-1], "for the test")
    (tmp_path / "b" / "model.ckpt-12" / "model.pt").write_bytes(b"short")
    title, *rows = [line.split() for line in stepguard("ls", tmp_path).stdout.splitlines()]
    assert title == ["RUN", "CHECKPOINTS", "DAMAGED", "SIZE", "STEP", "AGE", "NAME"]
    # Without the age, a number with its unit.
    assert [[*row[:-4], row[-4], row[-1]] for row in rows] == [
        [str(tmp_path / "b"), "2", "2", *rows[0][3:5], "5", "model.ckpt-5"],
        [str(tmp_path / "deep" / "a"), "1", "-", *rows[1][3:5], "3", "model.ckpt-3"],
    ]
    (tmp_path / "empty").mkdir()
    runs = document("ls", tmp_path / "deep" / "a", tmp_path / "empty", tmp_path / "deep")["runs"]
    assert [one["logdir"] for one in runs] == [str(tmp_path / "deep" / "a"), str(tmp_path / "empty")]
    assert [len(one["checkpoints"]) for one in runs] == [1, 0]
