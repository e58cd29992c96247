"""Which checkpoint a start goes on from, when names, manifests and the state file do not agree: in every engine."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepguard.errors import CheckpointMismatchError, NoGoodCheckpointError
from stepguard.options import Restoring, Saving
from stepguard.store import CheckpointStore, statefile

CHIEF = """
import sys
from stepguard.store import CheckpointStore
hold = CheckpointStore(sys.argv[1]).acquire()
print("chief", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def logdir(engine, tmp_path) -> Path:
    """Holds the checkpoints of the steps 2, 4 and 6."""
    for _ in range(3):
        train(engine, tmp_path, 2)
    assert engine.committed(tmp_path) == [2, 4, 6]
    return tmp_path


def train(engine, logdir: Path, steps: int, **restoring: bool) -> int:
    """A run that saves its last step; the step that it begins at. Every value of the model is checked against that."""
    options = {"restoring": Restoring(**restoring)} if restoring else {}
    return int(engine.program(logdir, save_model_secs=0, saving=Saving(save_at_end=True), **options).train(steps))


def files_of(logdir: Path, step: int) -> list[Path]:
    name = f"model.ckpt-{step}"
    return sorted(path for path in logdir.iterdir() if path.name == name or path.name.startswith(f"{name}."))


def copy(logdir: Path, step: int, as_step: int, *, with_manifest: bool) -> None:
    for path in files_of(logdir, step):
        target = logdir / path.name.replace(f"ckpt-{step}", f"ckpt-{as_step}")
        if path.is_dir():
            shutil.copytree(path, target)
        elif with_manifest or not path.name.endswith(".manifest.json"):
            shutil.copy(path, target)


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)


def everything_in(directory: Path) -> dict[str, bytes]:
    inside = [one for one in directory.rglob("model.ckpt*/**/*") if one.is_file()]
    found = {str(one.relative_to(directory)): one.read_bytes() for one in inside}
    found.update({one.name: one.read_bytes() for one in directory.iterdir() if one.is_file()})
    return {name: content for name, content in found.items() if "model.ckpt" in name or name == statefile.FILE_NAME}


class TestACopyUnderANewerName:
    def test_without_its_manifest_is_not_gone_on_with(self, engine, logdir, caplog):
        copy(logdir, 2, 8, with_manifest=False)

        assert train(engine, logdir, 1) == 6

        if engine.name == "tensorflow":
            # In the others a directory without a manifest is no checkpoint.
            assert "model.ckpt-8 is passed over (it has no manifest, and holds step 2)" in warnings(caplog)
        assert engine.committed(logdir) == [2, 4, 6, 7]

    def test_with_its_manifest_is_put_aside_and_said(self, engine, logdir, caplog):
        copy(logdir, 2, 8, with_manifest=True)

        assert train(engine, logdir, 1) == 6

        assert "expected the manifest of model.ckpt-8, found that of model.ckpt-2" in warnings(caplog)
        assert (logdir / "quarantine" / "model.ckpt-8").is_dir()
        assert engine.committed(logdir) == [2, 4, 6, 7]

    def test_that_is_the_newest_one_renamed_costs_a_step_back_and_is_said(self, engine, logdir, caplog):
        copy(logdir, 6, 8, with_manifest=True)
        for path in files_of(logdir, 6):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        assert train(engine, logdir, 1) == 4

        assert "found that of model.ckpt-6" in warnings(caplog)
        assert (logdir / "quarantine" / "model.ckpt-8").is_dir()


class TestAnotherEnginesCheckpoint:
    def test_as_the_newest_is_refused_by_name_and_nothing_is_moved(self, engine, logdir):
        store = CheckpointStore(logdir, engine="stranger")
        (store.stage("model.ckpt-8") / "model.ckpt-8").mkdir()
        (logdir / ".stage-model.ckpt-8" / "model.ckpt-8" / "weights").write_bytes(b"weights")
        store.commit("model.ckpt-8", 8)
        before = everything_in(logdir)

        with pytest.raises(CheckpointMismatchError, match=rf"engine '{engine.name}', found one of 'stranger'"):
            train(engine, logdir, 1)

        assert everything_in(logdir) == before

    def test_under_another_name_is_no_concern_of_this_one(self, engine, logdir):
        store = CheckpointStore(logdir, engine="stranger", basename="theirs")
        (store.stage("theirs-8") / "theirs-8").mkdir()
        (logdir / ".stage-theirs-8" / "theirs-8" / "weights").write_bytes(b"weights")
        store.commit("theirs-8", 8)

        assert train(engine, logdir, 1) == 6
        assert (logdir / "theirs-8" / "weights").exists()


class TestAStateFile:
    def test_that_names_one_that_is_gone_costs_what_is_gone_and_is_said_once(self, engine, logdir, caplog):
        statefile.write(logdir, "model.ckpt-8", ["model.ckpt-6", "model.ckpt-8"])

        assert train(engine, logdir, 0) == 6
        assert "names it as the newest, and there is no file of it" in warnings(caplog)
        assert "2 steps earlier" in warnings(caplog)

        caplog.clear()
        assert train(engine, logdir, 0) == 6
        assert warnings(caplog) == ""

    def test_that_names_what_is_all_gone_is_no_fresh_start(self, engine, logdir):
        for step in (2, 4, 6):
            for path in files_of(logdir, step):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        with pytest.raises(NoGoodCheckpointError, match=r"model\.ckpt-6.*there is no file of it"):
            train(engine, logdir, 1)

        assert train(engine, logdir, 0, start_over_when_all_damaged=True) == 0
        # The state file was put aside with the rest: the next start is no question any more.
        assert train(engine, logdir, 1) == 0
        assert train(engine, logdir, 0) == 1

    def test_that_names_a_file_outside_does_not_win_over_what_is_here(self, engine, logdir, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere") / "run"
        shutil.copytree(logdir, elsewhere)
        train(engine, elsewhere, 3)
        shutil.copy(elsewhere / statefile.FILE_NAME, logdir)

        assert train(engine, logdir, 1) == 6

    def test_that_names_a_file_outside_is_followed_where_nothing_is_here(self, engine, logdir, tmp_path_factory):
        new = tmp_path_factory.mktemp("new")
        shutil.copy(logdir / statefile.FILE_NAME, new)
        before = everything_in(logdir)

        assert train(engine, new, 1) == 6

        assert engine.committed(new) == [7]
        assert everything_in(logdir) == before


class TestStartingOver:
    def test_puts_all_aside_the_state_file_too(self, engine, logdir):
        for step in (2, 4, 6):
            engine.damage(logdir, step)

        assert train(engine, logdir, 1, start_over_when_all_damaged=True) == 0

        assert {path.name for path in (logdir / "quarantine").iterdir()} == {
            "model.ckpt-2", "model.ckpt-4", "model.ckpt-6", statefile.FILE_NAME,
        }  # fmt: skip
        assert engine.committed(logdir) == [1]


class TestWhileAnotherProcessIsTheChief:
    @pytest.fixture
    def chief(self, logdir) -> Iterator[None]:
        with subprocess.Popen(
            [sys.executable, "-c", CHIEF, str(logdir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "chief\n"
            yield
            process.communicate("")

    @pytest.mark.usefixtures("chief")
    def test_a_reader_moves_nothing(self, engine, logdir, caplog):
        engine.damage(logdir, 6)
        before = everything_in(logdir)

        # It saves nothing, and so is not refused.
        assert engine.program(logdir, save_model_secs=0).train(0) == 4

        assert "left where it is" in warnings(caplog)
        assert everything_in(logdir) == before

    @pytest.mark.usefixtures("chief")
    def test_a_reader_does_not_start_over(self, engine, logdir):
        for step in (2, 4, 6):
            engine.damage(logdir, step)
        before = everything_in(logdir)

        options = Restoring(start_over_when_all_damaged=True)
        with pytest.raises(NoGoodCheckpointError):
            engine.program(logdir, save_model_secs=0, restoring=options).train(0)

        assert everything_in(logdir) == before
