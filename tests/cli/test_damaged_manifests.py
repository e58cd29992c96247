"""Commands that mean one checkpoint, where a manifest is damaged: the right one, or one clear error; never another."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from crafted import nested
from logdirs import commit, flip

from stepguard.disk import files
from stepguard.store import CheckpointStore
from stepguard.store.manifest import SUFFIX
from stepguard.store.marks import BestRule, Marks

RULE = BestRule("val_loss", "min", 1)


def body_of(path: Path) -> dict[str, object]:
    body: dict[str, object] = json.loads(path.read_bytes())
    del body["digest"]
    return body


def signed(path: Path, body: dict[str, object]) -> None:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")
    path.write_text(json.dumps({**body, "digest": files.digest_bytes(canonical)}))


DAMAGES = {
    "no JSON": lambda path: path.write_bytes(b"{ damaged"),
    "empty": lambda path: path.write_bytes(b""),
    "deep": lambda path: path.write_text(json.dumps(nested(500))),
    "a list": lambda path: path.write_text("[]"),
    "a bit": flip,
    "no step": lambda path: signed(path, {key: one for key, one in body_of(path).items() if key != "step"}),
    "a step of text": lambda path: signed(path, {**body_of(path), "step": "2"}),
    "another version": lambda path: signed(path, {**body_of(path), "format_version": 99}),
    "another name": lambda path: signed(path, {**body_of(path), "name": "model.ckpt-1"}),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}
damages = pytest.mark.parametrize("damage", DAMAGES)


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    """Steps 1 to 4; 2 is the best, and has the name "paper"."""
    store = commit(tmp_path / "run", 1, 2, 3, 4, saver_files=None)
    for step, loss in ((1, 4.0), (2, 1.0), (3, 2.0), (4, 3.0)):
        names = ("paper",) if step == 2 else ()
        store.mark(f"model.ckpt-{step}", Marks({"val_loss": loss}, names=names, best=RULE))
    return tmp_path / "run"


def listing(logdir: Path) -> list[str]:
    return sorted(one.relative_to(logdir).as_posix() for one in logdir.rglob("*") if one.name != ".stepguard.lock")


def choosing(logdir: Path, target: str) -> list[list[object]]:
    """The commands that mean one checkpoint by its marks or step."""
    out = logdir.parent / "out.pt"
    return [
        ["rollback", logdir, "--to", target],
        ["keep", logdir, target],
        ["keep", logdir, target, "--name", "other"],
        ["unkeep", logdir, target],
        ["export", logdir, out, "--weights", "--step", target],
        *([["best", logdir]] if target == "best" else []),
    ]


@damages
@pytest.mark.parametrize("target", ["best", "paper"])
def test_no_other_is_taken_for_one_that_may_be_the_damaged(damage, target, logdir, stepguard):
    DAMAGES[damage](logdir / f"model.ckpt-2{SUFFIX}")
    for command in choosing(logdir, target):
        before = listing(logdir)
        done = stepguard(*command)
        assert done.exit_code in (1, 3), command
        assert "model.ckpt-2" in done.stderr, command
        assert "its manifest cannot be read" in done.stderr, command
        assert len(done.stderr.splitlines()) == 1, command
        assert listing(logdir) == before, command
    assert not (logdir / "rollback.json").exists()


@damages
def test_the_step_of_the_damaged_is_an_error_and_that_of_another_is_not(damage, logdir, stepguard):
    DAMAGES[damage](logdir / f"model.ckpt-2{SUFFIX}")
    for command in choosing(logdir, "2"):
        done = stepguard(*command)
        assert done.exit_code in (1, 3), (command, done.output)
        assert "model.ckpt-2" in done.stderr, command
    assert not (logdir / "rollback.json").exists()
    assert stepguard("keep", logdir, "3").exit_code == 0
    assert stepguard("rollback", logdir, "--to", "1").exit_code == 0


def test_the_best_whose_data_are_damaged_is_no_other(logdir, stepguard):
    (logdir / "model.ckpt-2" / "model.pt").write_bytes(b"")
    for command in (["best", logdir], ["rollback", logdir, "--to", "best"], *choosing(logdir, "paper")[:1]):
        done = stepguard(*command)
        assert done.exit_code == 1
        assert "model.ckpt-2" in done.stderr
    assert not (logdir / "rollback.json").exists()


@damages
def test_the_others_are_told_of_and_the_damaged_is_named(damage, logdir, stepguard):
    DAMAGES[damage](logdir / f"model.ckpt-4{SUFFIX}")
    for command in (["ls"], ["verify"], ["status"], ["prune", "--keep-last", "1", "--dry-run"], ["show"], ["report"]):
        more = ["-o", logdir.parent / "page.html"] if command == ["report"] else []
        done = stepguard(*command, logdir, *more)
        assert done.exit_code in (0, 1, 3), (command, done.output)
        if command[0] in ("ls", "verify"):
            assert "model.ckpt-4" in done.output
            assert "model.ckpt-3" in done.output


@damages
def test_push_names_the_newest_that_is_damaged_and_sends_the_one_before(damage, logdir, tmp_path, stepguard, document):
    DAMAGES[damage](logdir / f"model.ckpt-4{SUFFIX}")
    found = document("push", logdir, (tmp_path / "mirror").as_uri())
    assert found["pushed"] == ["model.ckpt-3"]
    assert list(found["damaged"]) == ["model.ckpt-4"]


@pytest.mark.parametrize("damage", [one for one in DAMAGES if one != "a pipe"])
@pytest.mark.parametrize("target", ["best", "paper", "2"])
def test_a_mirror_with_the_damage_is_no_other_place(damage, target, logdir, tmp_path, stepguard):
    shutil.copytree(logdir, tmp_path / "mirror")
    DAMAGES[damage](tmp_path / "mirror" / f"model.ckpt-2{SUFFIX}")
    url, out = (tmp_path / "mirror").as_uri(), tmp_path / "out.pt"
    done = stepguard("export", url, out, "--weights", "--step", target)
    assert done.exit_code in (1, 3)
    assert "model.ckpt-2" in done.stderr
    assert not out.exists()
    done = stepguard("pull", url, tmp_path / "pulled", "--all")
    assert done.exit_code in (1, 3)
    assert "Traceback" not in done.output
    here = CheckpointStore(tmp_path / "pulled", engine="torch").candidates()
    assert 2 not in [one.step for one in here]
