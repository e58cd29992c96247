"""``stepguard keep``, ``unkeep`` and ``best``, and what ``ls`` and ``prune`` make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from logdirs import commit

from stepguard.store import CheckpointStore
from stepguard.store.marks import BestRule, Marks

RULE = BestRule("val_loss", "min", 2)


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    """Steps 1 to 5, of which 3 is the best and 4 the second; the name of 2 is "start"."""
    store = commit(tmp_path, 1, 2, 3, 4, 5, saver_files=None)
    for step, loss in ((1, 4.0), (3, 1.0), (4, 2.0)):
        store.mark(f"model.ckpt-{step}", Marks({"val_loss": loss}, best=RULE))
    store.mark("model.ckpt-2", Marks(names=("start",)))
    return tmp_path


def steps(logdir: Path) -> list[int | None]:
    return [one.step for one in CheckpointStore(logdir).candidates()]


def test_ls_says_what_was_measured_and_why_one_is_kept(logdir, stepguard, document):
    lines = [line.split("good")[-1].split("  ") for line in stepguard("ls", logdir).stdout.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines[1:]] == [
        ["-", "-", "model.ckpt-5"],
        ["2nd best", "val_loss 2", "model.ckpt-4"],
        ["best", "val_loss 1", "model.ckpt-3"],
        ["start", "-", "model.ckpt-2"],
        ["-", "val_loss 4", "model.ckpt-1"],
    ]
    found = document("ls", logdir)["checkpoints"]
    assert [one["best"] for one in found] == [None, 2, 1, None, None]
    assert (found[2]["metrics"], found[3]["names"], found[3]["kept"]) == ({"val_loss": 1.0}, ["start"], False)


def test_best_prints_the_path_and_nothing_else(logdir, stepguard, document):
    assert stepguard("best", logdir).stdout == f"{logdir}/model.ckpt-3\n"
    assert document("best", logdir) == {
        "checkpoint": f"{logdir}/model.ckpt-3",
        "step": 3,
        "metrics": {"val_loss": 1.0},
    }


def test_best_of_a_run_without_metrics_is_a_finding_that_says_what_to_do(tmp_path, stepguard):
    commit(tmp_path, 1)
    ended = stepguard("best", tmp_path)
    assert ended.exit_code == 1
    assert "keep_best" in ended.stderr


@pytest.mark.parametrize(("target", "step"), [("1", 1), ("best", 3), ("start", 2), ("model.ckpt-5", 5)])
def test_what_is_kept_may_be_said_in_four_ways(logdir, stepguard, document, target, step):
    assert stepguard("keep", logdir, target).exit_code == 0
    assert [one["step"] for one in document("ls", logdir)["checkpoints"] if one["kept"]] == [step]


def test_a_name_moves_from_one_to_the_other(logdir, stepguard, document):
    commit(logdir, 6, saver_files=None)
    assert stepguard("keep", logdir, "6", "--name", "start").exit_code == 0
    assert [one["names"] for one in document("ls", logdir)["checkpoints"]] == [["start"], [], [], [], [], []]


def test_prune_leaves_the_pinned_alone_until_they_are_not(logdir, stepguard):
    stepguard("prune", logdir, "--keep-last", "1")
    assert steps(logdir) == [5, 4, 3, 2]
    assert "no longer kept" in stepguard("unkeep", logdir, "start").stdout
    stepguard("prune", logdir, "--keep-last", "1")
    assert steps(logdir) == [5, 4, 3]


def test_unkeep_takes_one_name_by_that_name_and_all_by_the_step(logdir, stepguard, document):
    stepguard("keep", logdir, "2")
    stepguard("keep", logdir, "2", "--name", "other")
    assert "name taken away" in stepguard("unkeep", logdir, "start").stdout
    kept = document("ls", logdir)["checkpoints"][3]
    assert (kept["names"], kept["kept"]) == (["other"], True)
    assert "no longer kept" in stepguard("unkeep", logdir, "2").stdout
    assert stepguard("unkeep", logdir, "2").exit_code == 1


def test_what_is_kept_no_longer_counts_for_the_next_run(tmp_path, stepguard):
    store = CheckpointStore(tmp_path, engine="torch", max_to_keep=2)
    with store.acquire():
        for step in (1, 2, 3, 4):
            commit_by(store, step, Marks(names=("one",)) if step == 1 else None)
    assert steps(tmp_path) == [4, 3, 1]
    stepguard("unkeep", tmp_path, "one")

    again = CheckpointStore(tmp_path, engine="torch", max_to_keep=2)
    with again.acquire():
        again.adopt_earlier()
        commit_by(again, 5)
    assert steps(tmp_path) == [5, 4]


def commit_by(store: CheckpointStore, step: int, marks: Marks | None = None) -> None:
    name = store.name(step)
    (store.stage(name) / name).mkdir()
    (store.root / f".stage-{name}" / name / "model.pt").write_bytes(b"weights")
    store.commit(name, step, marks=marks)
    store.prune()


@pytest.mark.parametrize("target", ["7", "nothing", "../2", "0x2"])
def test_what_is_not_there_is_named_with_what_is(logdir, stepguard, target):
    ended = stepguard("keep", logdir, target)
    assert ended.exit_code == 1
    assert "found the steps 5, 4, 3, 2, 1 and the names start" in ended.stderr


def test_a_name_that_could_be_taken_for_a_step_is_a_mistake(logdir, stepguard):
    assert stepguard("keep", logdir, "2", "--name", "12").exit_code == 2


@pytest.mark.parametrize("verb", ["keep", "unkeep"])
def test_while_another_is_the_chief_nothing_is_changed(logdir, stepguard, verb, monkeypatch):
    before = (logdir / "model.ckpt-2.manifest.json").read_bytes()
    with CheckpointStore(logdir).acquire():
        monkeypatch.setattr("stepguard.store.lock._held", {}, raising=False)
        ended = stepguard(verb, logdir, "2")
    assert ended.exit_code in (0, 1)
    assert ended.exit_code == 0 or (logdir / "model.ckpt-2.manifest.json").read_bytes() == before
