"""Runs with a mirror that have pinned checkpoints, and runs that are put back: what the mirror knows of that."""

from __future__ import annotations

import json
import shutil

import mirrors
import pytest
from click.testing import CliRunner
from mirrors import names, save_step, train

from stepguard.cli.main import cli
from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.options import Mirror, Restoring, Saving, Stopping
from stepguard.remote.objects import RemoteError
from stepguard.store import rollback
from stepguard.testing import FakeSupervisor


def command(*args):
    found = CliRunner().invoke(cli, [str(one) for one in args])
    assert found.exit_code == 0, found.output
    return found.output


def marks_in(url, name):
    return mirrors.copies(url).manifest(name).marks


def with_best(logdir, url, **options):
    """A Supervisor that saves each step, and keeps the one with the smallest loss."""
    saving = Saving(save_model_steps=1, save_at_end=True, max_to_keep=3, keep_best=("loss", "min", 1))
    return FakeSupervisor(
        str(logdir), save_model_secs=0, save_summaries_secs=0, saving=saving, mirror=Mirror(url), **options
    )


def with_losses(logdir, url):
    """Train three steps, of which the first is the best and has a name; all are in the mirror."""
    sv = with_best(logdir, url)
    with sv.managed_session() as session:
        for loss in (0.25, 0.5, 0.75):
            save_step(sv, session)
            sv.metrics(session, {"loss": loss})
    command("keep", logdir, "1", "--name", "paper")
    command("push", logdir, url, "--all")


def saved(logdir, url, steps, **saving):
    """Train, with a checkpoint of each step in the mirror."""
    sv = mirrors.supervisor(logdir, url, every=1, **saving)
    with sv.managed_session() as session:
        for _ in range(steps):
            save_step(sv, session)
            mirrors.wait_until(lambda: f"model.ckpt-{session.step}" in names(url))


class TestMarks:
    def test_that_are_given_while_it_trains_are_in_the_mirror(self, url, tmp_path):
        logdir = tmp_path / "run"
        sv = mirrors.supervisor(logdir, url, every=1)
        with sv.managed_session() as session:
            for _ in range(3):
                save_step(sv, session)
            mirrors.wait_until(lambda: "model.ckpt-3" in names(url))
            assert sv._saving.save_for("paper").is_done
            mirrors.wait_until(lambda: marks_in(url, "model.ckpt-3").names == ("paper",))
        (found, *_) = [one for one in mirrors.copies(url).listed() if one.name == "model.ckpt-3"]
        place = mirrors.copies(url)
        assert place.damages(found, place.manifest("model.ckpt-3"), reads=True) == []

    def test_that_are_given_between_two_runs_go_with_the_next(self, url, tmp_path):
        logdir = tmp_path / "run"
        saved(logdir, url, 3)
        command("keep", logdir, "2")

        train(logdir, url, 0)
        assert marks_in(url, "model.ckpt-2").is_kept
        # The newest is still the one to go on from.
        assert names(url)[0] == "model.ckpt-3"
        assert "damaged" not in mirrors.warnings(logdir)

    def test_are_sent_by_push_as_well(self, url, tmp_path):
        logdir, place = tmp_path / "run", tmp_path / "copy"
        train(logdir, url, 3)
        command("push", logdir, place)
        command("keep", logdir, "3", "--name", "paper")
        command("push", logdir, place)
        assert marks_in(str(place), "model.ckpt-3").names == ("paper",)

    @pytest.mark.parametrize("by_command", [True, False])
    def test_come_back_to_an_empty_disk(self, url, tmp_path, by_command):
        train(tmp_path / "run", url, 3)
        command("keep", tmp_path / "run", "3", "--name", "paper")
        train(tmp_path / "run", url, 0)
        shutil.rmtree(tmp_path / "run")

        if by_command:
            command("pull", url, tmp_path / "elsewhere")
        else:
            train(tmp_path / "elsewhere", url, 0)
        (found,) = json.loads(command("ls", tmp_path / "elsewhere", "--json"))["checkpoints"]
        assert found["names"] == ["paper"]


def test_what_is_pinned_stays_in_the_mirror_also_when_another_machine_goes_on(url, tmp_path):
    logdir = tmp_path / "run"
    saved(logdir, url, 2, keep=2)
    command("keep", logdir, "1", "--name", "paper")
    saved(logdir, url, 3, keep=2)
    assert set(names(url)) == {"model.ckpt-1", "model.ckpt-4", "model.ckpt-5"}

    # It fetches the newest alone, and knows the pinned one from the mirror.
    saved(tmp_path / "elsewhere", url, 3, keep=2)
    assert set(names(url)) == {"model.ckpt-1", "model.ckpt-7", "model.ckpt-8"}


def test_what_was_here_is_pruned_also_after_a_newer_one_was_fetched(url, tmp_path):
    logdir = tmp_path / "run"
    saved(logdir, url, 3)
    saved(tmp_path / "elsewhere", url, 1)

    saved(logdir, url, 1)
    assert sorted(one.name for one in logdir.glob("*.manifest.json")) == [
        f"model.ckpt-{step}.manifest.json" for step in (3, 4, 5)
    ]


class TestRollback:
    def test_is_not_undone_by_what_the_mirror_has(self, url, tmp_path):
        logdir = tmp_path / "run"
        saved(logdir, url, 3)
        command("rollback", logdir, "--to", "1")

        assert train(logdir, url, 0) == 1

    def test_is_known_to_another_machine(self, url, tmp_path):
        logdir = tmp_path / "run"
        saved(logdir, url, 3)
        command("rollback", logdir, "--to", "1")
        assert train(logdir, url, 0) == 1
        assert names(url)[0] == "model.ckpt-1"
        shutil.rmtree(logdir)

        assert train(tmp_path / "elsewhere", url, 1) == 1
        # What has been done since is no part of what was given up, though it is later and of the same names.
        saved(tmp_path / "elsewhere", url, 3)
        shutil.rmtree(tmp_path / "elsewhere")
        assert train(tmp_path / "third", url, 0) == 5

    def test_is_sent_by_push(self, url, tmp_path):
        logdir, place = tmp_path / "run", tmp_path / "copy"
        saved(logdir, url, 3)
        command("push", logdir, place, "--all")
        command("rollback", logdir, "--to", "1")
        command("push", logdir, place)
        assert names(str(place))[0] == "model.ckpt-1"

    def test_that_the_program_asks_for_is_done_once_wherever_it_runs(self, url, tmp_path):
        logdir = tmp_path / "run"
        saved(logdir, url, 3)

        def begun(place, restoring, steps=1):
            sv = FakeSupervisor(
                str(place),
                save_model_secs=0,
                save_summaries_secs=0,
                saving=Saving(save_at_end=True),
                restoring=restoring,
                mirror=Mirror(url),
            )
            with sv.managed_session() as session:
                step = session.step
                for _ in range(steps):
                    session.run_step()
            return step

        assert begun(logdir, Restoring(step=1)) == 1
        shutil.rmtree(logdir)
        assert begun(tmp_path / "elsewhere", Restoring(step=1)) == 2
        # It asks no more: the note is gone in both, so that it may ask again.
        assert begun(tmp_path / "elsewhere", Restoring()) == 3
        assert rollback.read(tmp_path / "elsewhere") is None
        assert mirrors.copies(url).remote.head(rollback.FILE_NAME) is None

    @pytest.mark.parametrize("asked", [1, "best", "paper"])
    @pytest.mark.parametrize("has_newest", [False, True])
    def test_that_the_program_asks_for_goes_to_a_checkpoint_that_only_the_mirror_has(
        self, url, tmp_path, asked, has_newest
    ):
        logdir = tmp_path / "run"
        with_losses(logdir, url)
        if has_newest:
            command("pull", url, tmp_path / "elsewhere")

        sv = with_best(tmp_path / "elsewhere", url, restoring=Restoring(step=asked))
        with sv.managed_session() as session:
            assert session.step == 1
        assert rollback.read(tmp_path / "elsewhere").to == "model.ckpt-1"
        assert train(tmp_path / "elsewhere", url, 0) == 1

    def test_that_the_program_asks_for_goes_to_a_damaged_checkpoint_that_the_mirror_repairs(self, url, tmp_path):
        logdir = tmp_path / "run"
        saved(logdir, url, 3)
        (weights, *_) = [one for one in (logdir / "model.ckpt-1").iterdir() if one.stat().st_size]
        weights.write_bytes(b"damaged")
        with with_best(logdir, url, restoring=Restoring(step=1)).managed_session() as session:
            assert session.step == 1
        assert "repaired from" in mirrors.warnings(logdir)

    @pytest.mark.parametrize("asked", ["best", "paper"])
    def test_that_the_program_asks_for_waits_for_a_mirror_that_cannot_be_reached(self, tmp_path, asked):
        logdir, place = tmp_path / "run", tmp_path / "mirror"
        with_losses(logdir, place.as_uri())
        mirrors.remove(logdir, "model.ckpt-1")
        place.rename(tmp_path / "away")
        place.write_text("no directory")

        def begun(restoring):
            with with_best(logdir, place.as_uri(), restoring=restoring).managed_session() as session:
                return session.step

        # Here alone, step 2 would be the best.
        with pytest.raises(RemoteError, match="the program asks for is there, and it cannot be reached"):
            begun(Restoring(step=asked))
        assert rollback.read(logdir) is None
        place.unlink()
        (tmp_path / "away").rename(place)
        assert begun(Restoring(step=asked)) == 1

    def test_to_a_step_that_is_here_needs_no_mirror(self, tmp_path):
        logdir, place = tmp_path / "run", tmp_path / "mirror"
        with_losses(logdir, place.as_uri())
        shutil.rmtree(place)
        place.write_text("no directory")
        sv = with_best(logdir, place.as_uri(), restoring=Restoring(step=2), stopping=Stopping(stop_grace_secs=1))
        with sv.managed_session() as session:
            assert session.step == 2

    @pytest.mark.parametrize("asked", ["best", "paper"])
    def test_that_the_program_asks_for_goes_to_the_one_with_a_damaged_manifest_if_the_mirror_has_it(
        self, url, tmp_path, asked
    ):
        logdir = tmp_path / "run"
        with_losses(logdir, url)
        (logdir / "model.ckpt-1.manifest.json").write_bytes(b"{ damaged")
        with with_best(logdir, url, restoring=Restoring(step=asked)).managed_session() as session:
            assert session.step == 1

    def test_that_the_program_asks_for_is_refused_if_a_damaged_manifest_may_name_it(self, tmp_path):
        logdir = tmp_path / "run"
        with_losses(logdir, (tmp_path / "mirror").as_uri())
        (logdir / "model.ckpt-1.manifest.json").write_bytes(b"{ damaged")
        saving = Saving(save_model_secs=0, keep_best=("loss", "min", 1))
        sv = FakeSupervisor(str(logdir), saving=saving, restoring=Restoring(step="best"))
        with pytest.raises(CheckpointCorruptError, match="may be the checkpoint 'best' that"), sv.managed_session():
            pass
        assert rollback.read(logdir) is None

    def test_that_the_program_asks_for_is_refused_if_neither_has_the_step(self, url, tmp_path):
        train(tmp_path / "run", url, 3)
        sv = with_best(tmp_path / "elsewhere", url, restoring=Restoring(step=2))
        with pytest.raises(CheckpointError, match="expected a checkpoint 2, found the steps 3"), sv.managed_session():
            pass

    def test_that_cannot_be_read_there_is_passed_over(self, url, tmp_path):
        train(tmp_path / "run", url, 2)
        mirrors.copies(url).remote.put(rollback.FILE_NAME, b'{"to": "../../x"}')
        assert train(tmp_path / "elsewhere", url, 0) == 2
        assert rollback.read(tmp_path / "elsewhere") is None

    @pytest.mark.parametrize("asked", ["best", "paper", 1])
    @pytest.mark.parametrize("content", [b"{ damaged", b"", b"[]"])
    def test_that_the_program_asks_for_is_refused_if_only_the_mirror_has_it_and_its_manifest_is_damaged(
        self, url, tmp_path, asked, content
    ):
        logdir = tmp_path / "run"
        with_losses(logdir, url)
        mirrors.remove(logdir, "model.ckpt-1")
        mirrors.copies(url).remote.put("model.ckpt-1.manifest.json", content)
        sv = with_best(logdir, url, restoring=Restoring(step=asked))
        with (
            pytest.raises(CheckpointCorruptError, match=r"may be the checkpoint .* that the program"),
            sv.managed_session(),
        ):
            pass
        assert rollback.read(logdir) is None
        with with_best(logdir, url, restoring=Restoring(step=2)).managed_session() as session:
            assert session.step == 2
