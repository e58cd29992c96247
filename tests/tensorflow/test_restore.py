"""What is restored, what is said when it does not fit, and what a damaged checkpoint of TensorFlow's own costs."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stepguard.errors import CheckpointCorruptError, CheckpointMismatchError, NoGoodCheckpointError
from stepguard.options import Restoring, Saving
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1


def model(**shapes: Any) -> list[Any]:
    """Variables of these shapes (or initial values); and a global step."""
    step = v1.train.get_or_create_global_step()
    return [step, *(v1.get_variable(name, shape, initializer=v1.ones_initializer()) for name, shape in shapes.items())]


def write_theirs(logdir: Path, steps: list[int], name: str = "model.ckpt", **shapes: Any) -> None:
    """Checkpoints as TensorFlow's own Saver writes them, without manifests; every value is its step."""
    with tf.Graph().as_default():
        variables = model(**shapes)
        saver = v1.train.Saver()
        with v1.Session() as session:
            for step in steps:
                for variable in variables:
                    session.run(variable.initializer, {variable.initial_value: np.full(variable.shape, step)})
                saver.save(session, str(logdir / name), global_step=step)


def write_ours(logdir: Path, steps: int, **shapes: Any) -> None:
    with tf.Graph().as_default():
        step, *_ = model(**shapes)
        raise_step = step.assign_add(steps)
        with Supervisor(
            logdir=str(logdir), save_model_secs=0, saving=Saving(save_at_end=True)
        ).managed_session() as session:
            session.run(raise_step)


def save_by_hand(logdir: Path, name: str, steps: int) -> None:
    """A run that does so many steps more, and that its program alone saves."""
    with tf.Graph().as_default():
        step, *_ = model(a=[1])
        raise_step = step.assign_add(steps)
        supervisor = Supervisor(logdir=str(logdir), save_model_secs=0)
        with supervisor.managed_session() as session:
            session.run(raise_step)
            supervisor.saver.save(session, str(logdir / name), global_step=step)


def steps_at_start(logdir: Path) -> int:
    with tf.Graph().as_default():
        step, *_ = model(a=[1])
        with Supervisor(logdir=str(logdir), save_model_secs=0).managed_session() as session:
            return int(session.run(step))


def newest_path(logdir: Path) -> str:
    return str(tf.train.latest_checkpoint(str(logdir)))


def content(logdir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(logdir)): path.read_bytes()
        for path in logdir.rglob("*")
        if path.is_file() and ("model.ckpt" in path.name or path.name == "checkpoint")
    }


@pytest.fixture
def untrained(graph) -> Any:
    """An ``init_fn`` that must not be called: what is there already is not to be initialised over."""

    def init_fn(session: Any) -> None:
        raise AssertionError("the model must not be initialised")

    return init_fn


class TestMismatch:
    @pytest.fixture(params=["theirs", "ours"])
    def logdir(self, request, tmp_path) -> Path:
        """Holds one checkpoint, with a manifest or without, of the variables a [2], b [3] and c []."""
        shapes = {"a": [2], "b": [3], "c": []}
        if request.param == "theirs":
            write_theirs(tmp_path, [4], **shapes)
        else:
            write_ours(tmp_path, 4, **shapes)
        return tmp_path

    def refused(self, logdir: Path, untrained: Any, **shapes: Any) -> CheckpointMismatchError:
        model(**shapes)
        before = content(logdir)
        supervisor = Supervisor(logdir=str(logdir), init_fn=untrained)

        with pytest.raises(CheckpointMismatchError) as caught, supervisor.managed_session():
            raise AssertionError("the block must not be entered")

        assert content(logdir) == before
        assert not (logdir / "quarantine").exists()
        assert "nothing was overwritten" in str(caught.value)
        return caught.value

    def test_of_missing_variables_names_them(self, logdir, untrained):
        error = self.refused(logdir, untrained, a=[2], b=[3], c=[], new=[1], newer=[1])

        assert error.missing == ("new", "newer")
        assert error.reshaped == {}
        assert isinstance(error, tf.errors.NotFoundError)

    def test_of_shapes_names_them(self, logdir, untrained):
        error = self.refused(logdir, untrained, a=[2], b=[4], c=[1])

        assert error.missing == ()
        assert set(error.reshaped) == {"b", "c"}
        assert "(4,)" in error.reshaped["b"][0]
        assert "(3,)" in error.reshaped["b"][1]
        assert isinstance(error, tf.errors.InvalidArgumentError)

    def test_of_all_kinds_names_them_all(self, logdir, untrained):
        error = self.refused(logdir, untrained, a=[5], new=[1])

        assert error.missing == ("new",)
        assert set(error.unexpected) == {"b", "c"}
        assert set(error.reshaped) == {"a"}
        assert all(name in str(error) for name in ("new", "b", "c", "a ("))

    def test_of_a_type_is_one(self, logdir, untrained):
        v1.train.get_or_create_global_step()
        v1.get_variable("a", [2], tf.float64)
        supervisor = Supervisor(logdir=str(logdir), init_fn=untrained)

        with pytest.raises(CheckpointMismatchError) as caught, supervisor.managed_session():
            raise AssertionError("the block must not be entered")

        assert set(caught.value.reshaped) == {"a"}

    def test_by_what_only_the_checkpoint_has_is_none(self, logdir, graph):
        _, a = model(a=[2])

        with Supervisor(logdir=str(logdir)).managed_session() as session:
            assert session.run(v1.train.get_global_step()) == 4
            assert session.run(a).shape == (2,)

    def test_is_none_for_a_saver_that_takes_any_shape_of_the_same_size(self, logdir, graph):
        model(b=[3, 1])
        saver = v1.train.Saver(reshape=True)

        with Supervisor(logdir=str(logdir), saver=saver).managed_session() as session:
            assert session.run(v1.train.get_global_step()) == 4

    def test_leaves_what_was_initialised_before_as_it_is(self, logdir, graph):
        """A restore by hand into a live session: the values that are there stay."""
        from stepguard.tensorflow.checkpoint.restore import Restorer

        _, a, _ = model(a=[2], new=[1])
        saver = v1.train.Saver()
        with v1.Session(graph=graph) as session:
            session.run(v1.global_variables_initializer())
            session.run(a.assign([7, 7]))
            with pytest.raises(CheckpointMismatchError):
                Restorer().restore_newest(session, saver, str(logdir))

            assert session.run(a).tolist() == [7, 7]


SHAPES: dict[str, list[int]] = {"a": [50], "b": [3, 4], "c": []}


def cut(path: Path, where: float) -> None:
    path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A logdir with the checkpoints of the steps 10 and 20 that TensorFlow's own Saver wrote."""
    logdir = tmp_path_factory.mktemp("pristine")
    write_theirs(logdir, [10, 20], **SHAPES)
    return logdir


def started(logdir: Path) -> list[Any]:
    """The values that a run begins with."""
    with tf.Graph().as_default():
        variables = model(**SHAPES)
        supervisor = Supervisor(
            logdir=str(logdir), save_model_secs=3600, saving=Saving(save_at_end=False), save_summaries_secs=0
        )
        with supervisor.managed_session() as session:
            return [np.unique(value).tolist() for value in session.run(variables)]


class TestDamageOfCheckpointsWithoutAManifest:
    """TensorFlow's own Saver wrote them: their restore is the only proof that they are good."""

    @pytest.fixture
    def logdir(self, pristine, tmp_path) -> Path:
        logdir = Path(shutil.copytree(pristine, tmp_path / "logdir"))
        state = (logdir / "checkpoint").read_text()
        # Else it would name the good checkpoints in the place that this is a copy of.
        (logdir / "checkpoint").write_text(state.replace(str(pristine), str(logdir)))
        return logdir

    def test_is_the_premise(self, logdir):
        assert started(logdir) == [[20]] * 4

    @pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
    def test_a_flipped_bit_costs_a_step_back_or_nothing_and_never_a_wrong_value(self, suffix, logdir, pristine):
        path = logdir / f"model.ckpt-20{suffix}"
        good = path.read_bytes()
        stepped_back = 0
        # One for which TensorFlow's reader has an error of a kind of its own, and some everywhere.
        places = [148, *range(0, len(good), len(good) // 20)]
        for where in places:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(good[:where] + bytes([good[where] ^ 0x80]) + good[where + 1 :])
            values = started(logdir)
            # A bit that is no part of the content, of a padding say, may flip and cost nothing.
            assert values in ([[20]] * 4, [[10]] * 4), where
            stepped_back += values == [[10]] * 4
            shutil.rmtree(logdir)
            shutil.copytree(pristine, logdir)

        assert stepped_back >= len(places) / 2

    @pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
    def test_a_cut_off_end_costs_a_step_back(self, suffix, logdir, pristine):
        for where in (0.0, 0.1, 0.5, 0.9, 0.99):
            cut(logdir / f"model.ckpt-20{suffix}", where)

            assert started(logdir) == [[10]] * 4, where
            assert (logdir / "quarantine" / "model.ckpt-20").is_dir()
            shutil.rmtree(logdir)
            shutil.copytree(pristine, logdir)

    @pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
    def test_a_missing_file_costs_a_step_back(self, suffix, logdir):
        (logdir / f"model.ckpt-20{suffix}").unlink()

        assert started(logdir) == [[10]] * 4

    def test_says_what_was_lost(self, logdir, caplog):
        cut(logdir / "model.ckpt-20.data-00000-of-00001", 0.5)

        with caplog.at_level(logging.WARNING, "stepguard"):
            started(logdir)

        (warning,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
        assert "model.ckpt-20" in warning
        assert "10 steps earlier" in warning

    def test_of_all_of_them_is_refused(self, logdir):
        for step in (10, 20):
            cut(logdir / f"model.ckpt-{step}.data-00000-of-00001", 0.5)
        before = content(logdir)

        with pytest.raises(NoGoodCheckpointError):
            started(logdir)

        assert content(logdir) == before

    def test_of_all_of_them_can_be_accepted(self, logdir, graph):
        for step in (10, 20):
            cut(logdir / f"model.ckpt-{step}.data-00000-of-00001", 0.5)
        variables = model(**SHAPES)

        supervisor = Supervisor(logdir=str(logdir), restoring=Restoring(start_over_when_all_damaged=True))
        with supervisor.managed_session() as session:
            assert session.run(variables[0]) == 0

        assert {"model.ckpt-10", "model.ckpt-20"} <= {path.name for path in (logdir / "quarantine").iterdir()}

    def test_of_the_meta_graph_costs_nothing(self, logdir):
        (logdir / "model.ckpt-20.meta").unlink()

        assert started(logdir) == [[20]] * 4

    @pytest.mark.parametrize("state", [None, b"", b"garbage \xff\0", b'model_checkpoint_path: "/gone/model.ckpt-20"\n'])
    def test_of_the_state_file_costs_nothing(self, state, logdir):
        (logdir / "checkpoint").unlink()
        if state is not None:
            (logdir / "checkpoint").write_bytes(state)

        assert started(logdir) == [[20]] * 4


class TestWhereCheckpointsLie:
    def test_under_another_basename(self, tmp_path, graph):
        step, *_ = model(a=[1])
        raise_step = step.assign_add(3)
        supervisor = Supervisor(
            logdir=str(tmp_path), checkpoint_basename="other", saving=Saving(save_at_end=True), save_model_secs=0
        )
        with supervisor.managed_session() as session:
            session.run(raise_step)

        with tf.Graph().as_default():
            step, *_ = model(a=[1])
            with Supervisor(logdir=str(tmp_path), checkpoint_basename="other").managed_session() as session:
                assert session.run(step) == 3

    def test_under_a_name_by_which_the_program_has_saved_what_is_newer(self, tmp_path, caplog):
        write_ours(tmp_path, 20, a=[1])
        save_by_hand(tmp_path, "mine", 10)

        assert steps_at_start(tmp_path) == 30
        assert "mine-30" in newest_path(tmp_path)

        write_ours(tmp_path, 1, a=[1])
        assert steps_at_start(tmp_path) == 31
        assert not caplog.records

    def test_under_a_name_by_which_the_program_has_saved_what_is_older(self, tmp_path):
        write_ours(tmp_path, 20, a=[1])
        write_theirs(tmp_path, [5], name="best", a=[1])

        assert "best-5" in newest_path(tmp_path)
        assert steps_at_start(tmp_path) == 20

    def test_and_that_one_is_damaged(self, tmp_path, caplog):
        write_ours(tmp_path, 20, a=[1])
        save_by_hand(tmp_path, "mine", 10)
        data = tmp_path / "mine-30.data-00000-of-00001"
        data.write_bytes(data.read_bytes()[:-1])

        assert steps_at_start(tmp_path) == 20
        assert "mine-30" in caplog.text

    def test_and_that_one_is_another_models(self, tmp_path, caplog):
        write_ours(tmp_path, 20, a=[1])
        write_theirs(tmp_path, [50], name="other", b=[2])

        assert steps_at_start(tmp_path) == 20
        assert "the newest by the state file, other-50, is not gone on with" in caplog.text

    def test_a_model_without_a_step_that_somebody_has_put_there_is_left_to_the_program(self, tmp_path, graph, caplog):
        step, a = model(a=[1])
        saver = v1.train.Saver([a])
        with v1.Session() as session:
            session.run(a.assign([7.0]))
            saver.save(session, str(tmp_path / "model.ckpt"))
        (tmp_path / "checkpoint").unlink()

        def init_fn(session: Any) -> None:
            saver.restore(session, str(tmp_path / "model.ckpt"))

        with Supervisor(logdir=str(tmp_path), init_fn=init_fn).managed_session() as session:
            assert (session.run(step), session.run(a)) == (0, [7.0])
        assert "no state file names it" in caplog.text

    def test_of_another_engine_are_no_damage(self, tmp_path, graph):
        store = CheckpointStore(tmp_path, engine="torch")
        stage = store.stage("model.ckpt-5")
        (stage / "model.ckpt-5").mkdir()
        (stage / "model.ckpt-5" / "model.pt").write_bytes(b"weights")
        store.commit("model.ckpt-5", 5)
        before = content(tmp_path)
        model(a=[1])

        with (
            pytest.raises(CheckpointMismatchError, match=r"'tensorflow', found one of 'torch'.*another logdir"),
            Supervisor(logdir=str(tmp_path)).managed_session(),
        ):
            pass
        assert content(tmp_path) == before

    def test_in_a_relative_logdir(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_ours(Path("runs/one"), 3, a=[1])

        with tf.Graph().as_default():
            step, *_ = model(a=[1])
            with Supervisor(logdir="runs/one").managed_session() as session:
                assert session.run(step) == 3

    def test_where_the_state_file_points_outside_of_the_logdir(self, tmp_path, graph):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "logdir").mkdir()
        write_theirs(tmp_path / "elsewhere", [6], a=[1])
        shutil.copy(tmp_path / "elsewhere" / "checkpoint", tmp_path / "logdir")
        step, *_ = model(a=[1])

        with Supervisor(logdir=str(tmp_path / "logdir")).managed_session() as session:
            assert session.run(step) == 6

    @pytest.mark.parametrize("wanted", ["theirs", "ours"])
    def test_the_newest_of_both_kinds_wins(self, wanted, tmp_path, graph):
        if wanted == "theirs":
            write_ours(tmp_path, 5, a=[1])
            write_theirs(tmp_path, [7], a=[1])
        else:
            write_theirs(tmp_path, [3], a=[1])
            write_ours(tmp_path, 4, a=[1])
        step, *_ = model(a=[1])

        with Supervisor(logdir=str(tmp_path)).managed_session() as session:
            assert session.run(step) == 7


def copy_files(logdir: Path, name: str, as_name: str) -> None:
    """What `cp` makes of a checkpoint: its manifest, if it has one, is forgotten."""
    for path in logdir.glob(f"{name}.*"):
        if not path.name.endswith(".manifest.json"):
            shutil.copy(path, logdir / path.name.replace(name, as_name))


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)


class TestANameThatIsNotTheStepThatIsHeld:
    """Files without a manifest can be copied and renamed: the global step that they hold counts, and not their name."""

    def test_a_copy_beside_checkpoints_of_tensorflows_own(self, tmp_path, caplog):
        write_theirs(tmp_path, [10, 20], a=[1])
        copy_files(tmp_path, "model.ckpt-10", "model.ckpt-60")

        assert steps_at_start(tmp_path) == 20
        assert "model.ckpt-60 is passed over (it has no manifest, and holds step 10)" in said(caplog)

    def test_a_copy_is_said_in_the_heartbeat_too(self, tmp_path):
        write_ours(tmp_path, 20, a=[1])
        write_theirs(tmp_path / "other", [10], a=[1])
        for path in (tmp_path / "other").glob("model.ckpt-10.*"):
            shutil.copy(path, tmp_path / path.name.replace("-10", "-60"))

        write_ours(tmp_path, 1, a=[1])

        assert "model.ckpt-60 is passed over" in (tmp_path / "heartbeats" / "chief.json").read_text()

    @pytest.mark.parametrize("state", ["kept", "removed"])
    def test_the_only_one_renamed_is_gone_on_with_from_the_step_that_it_holds(self, state, tmp_path, caplog):
        write_theirs(tmp_path, [20], a=[1])
        for path in tmp_path.glob("model.ckpt-20.*"):
            path.rename(tmp_path / path.name.replace("-20", "-60"))
        if state == "removed":
            (tmp_path / "checkpoint").unlink()

        assert steps_at_start(tmp_path) == 20
        assert "resuming from" in said(caplog)
        assert "model.ckpt-60, which holds step 20" in said(caplog)

    def test_a_copy_that_a_state_file_names_on_purpose_is_gone_on_with_and_said(self, tmp_path, caplog):
        write_theirs(tmp_path, [10, 20], a=[1])
        copy_files(tmp_path, "model.ckpt-10", "model.ckpt-60")
        tf.compat.v1.train.update_checkpoint_state(str(tmp_path), str(tmp_path / "model.ckpt-60"))

        assert steps_at_start(tmp_path) == 10
        assert "model.ckpt-60, which holds step 10" in said(caplog)

    def test_a_copy_under_another_basename_that_the_state_file_names_is_not_newer(self, tmp_path):
        write_ours(tmp_path, 20, a=[1])
        write_theirs(tmp_path, [5], name="mine", a=[1])
        copy_files(tmp_path, "mine-5", "mine-60")
        tf.compat.v1.train.update_checkpoint_state(str(tmp_path), str(tmp_path / "mine-60"))

        assert steps_at_start(tmp_path) == 20

    def test_one_without_a_step_in_its_name_that_the_program_has_saved_last_is_gone_on_with(self, tmp_path):
        write_ours(tmp_path, 20, a=[1])
        with tf.Graph().as_default():
            step, *_ = model(a=[1])
            raise_step = step.assign_add(10)
            supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0)
            with supervisor.managed_session() as session:
                session.run(raise_step)
                supervisor.saver.save(session, str(tmp_path / "on_stop.ckpt"))

        assert steps_at_start(tmp_path) == 30

    @pytest.mark.parametrize("name", [".kept", ".kept-30"])
    @pytest.mark.parametrize("is_newer", [True, False])
    def test_one_whose_name_begins_with_a_dot_is_gone_on_with_if_it_is_newer(self, is_newer, name, tmp_path):
        write_ours(tmp_path, 20 if is_newer else 40, a=[1])
        write_theirs(tmp_path, [30], name="mine", a=[1])
        for file in tmp_path.glob("mine-30.*"):
            file.rename(str(file).replace("mine-30", name))
        tf.compat.v1.train.update_checkpoint_state(str(tmp_path), str(tmp_path / name))

        assert steps_at_start(tmp_path) == (30 if is_newer else 40)

    def test_one_whose_step_is_counted_by_another_variable_goes_by_its_name(self, tmp_path):
        write_ours(tmp_path, 20, a=[1])
        with tf.Graph().as_default(), v1.Session() as session:
            other = v1.get_variable("other_step", initializer=7)
            session.run(other.initializer)
            v1.train.Saver().save(session, str(tmp_path / "model.ckpt"), global_step=60)

        with pytest.raises(CheckpointMismatchError, match=r"model\.ckpt-60 does not fit"):
            steps_at_start(tmp_path)


class TestANewerOneWithoutAManifest:
    def test_that_is_damaged_and_named_by_the_state_file_costs_a_step_back_and_is_said(self, tmp_path, caplog):
        write_ours(tmp_path, 5, a=[1])
        write_theirs(tmp_path, [7], a=[1])
        cut(tmp_path / "model.ckpt-7.index", 0.5)

        assert steps_at_start(tmp_path) == 5
        assert "model.ckpt-7 is damaged" in said(caplog)
        assert (tmp_path / "quarantine" / "model.ckpt-7").is_dir()

    @pytest.mark.parametrize("is_damaged", [False, True])
    def test_that_the_state_file_does_not_name_is_passed_over_and_said(self, is_damaged, tmp_path, caplog):
        write_ours(tmp_path, 5, a=[1])
        state = (tmp_path / "checkpoint").read_bytes()
        write_theirs(tmp_path, [7], a=[1])
        (tmp_path / "checkpoint").write_bytes(state)
        if is_damaged:
            cut(tmp_path / "model.ckpt-7.index", 0.5)

        assert steps_at_start(tmp_path) == 5
        assert "model.ckpt-7 is passed over (it has no manifest, and the state file does not name it)" in said(caplog)

    def test_is_the_last_resort_when_all_that_was_committed_is_damaged(self, tmp_path, caplog):
        write_ours(tmp_path, 5, a=[1])
        state = (tmp_path / "checkpoint").read_bytes()
        write_theirs(tmp_path, [7], a=[1])
        (tmp_path / "checkpoint").write_bytes(state)
        cut(tmp_path / "model.ckpt-5.index", 0.5)

        assert steps_at_start(tmp_path) == 7
        assert "model.ckpt-5 is damaged" in said(caplog)

    def test_that_the_program_lists_in_a_state_file_of_another_name_is_passed_over_and_said(self, tmp_path, caplog):
        """As on TensorFlow's own class, which reads the file ``checkpoint`` and no other."""
        write_ours(tmp_path, 20, a=[1])
        with tf.Graph().as_default():
            step, *_ = model(a=[1])
            raise_step = step.assign_add(10)
            supervisor = Supervisor(logdir=str(tmp_path), save_model_secs=0)
            with supervisor.managed_session() as session:
                session.run(raise_step)
                supervisor.saver.save(session, supervisor.save_path, global_step=step, latest_filename="by_hand")

        assert steps_at_start(tmp_path) == 20
        assert "model.ckpt-30 is passed over" in said(caplog)


class TestWhatOnlyTheStateFileLeadsTo:
    def test_and_is_damaged_costs_a_step_back(self, tmp_path, caplog):
        write_theirs(tmp_path / "elsewhere", [10, 20], name="theirs", a=[1])
        (tmp_path / "logdir").mkdir()
        shutil.copy(tmp_path / "elsewhere" / "checkpoint", tmp_path / "logdir")
        cut(tmp_path / "elsewhere" / "theirs-20.data-00000-of-00001", 0.5)

        assert steps_at_start(tmp_path / "logdir") == 10
        assert "theirs-20 is damaged" in said(caplog)
        assert "10 steps earlier" in said(caplog)

    def test_and_is_all_damaged_is_no_fresh_start(self, tmp_path):
        write_theirs(tmp_path / "elsewhere", [10], name="theirs", a=[1])
        (tmp_path / "logdir").mkdir()
        shutil.copy(tmp_path / "elsewhere" / "checkpoint", tmp_path / "logdir")
        cut(tmp_path / "elsewhere" / "theirs-10.data-00000-of-00001", 0.5)

        with pytest.raises(NoGoodCheckpointError, match="theirs-10"):
            steps_at_start(tmp_path / "logdir")


OLD_FORMAT = {"write_version": v1.train.SaverDef.V1}


def train_with(kind: Any, logdir: Path, **saver: Any) -> int:
    """Three steps under a Supervisor of that kind, and a last checkpoint; the step at which they began."""
    with tf.Graph().as_default():
        step = v1.train.get_or_create_global_step()
        raise_step = step.assign_add(1)
        options = {"saving": Saving(save_at_end=True)} if kind is Supervisor else {}
        supervisor = kind(
            logdir=str(logdir),
            saver=v1.train.Saver(**saver),
            save_summaries_secs=0,
            save_model_secs=0,
            summary_writer=None,
            **options,
        )
        with supervisor.managed_session() as session:
            begun = int(session.run(step))
            for _ in range(3):
                session.run(raise_step)
            if kind is not Supervisor:
                supervisor.saver.save(session, supervisor.save_path, global_step=step)
    return begun


@pytest.fixture
def reference_variables() -> Any:
    """The old format knows no others."""
    v1.disable_resource_variables()
    yield
    v1.enable_resource_variables()


@pytest.mark.usefixtures("reference_variables")
@pytest.mark.parametrize("is_sharded", [False, True], ids=["one file", "sharded"])
class TestTheOldFormat:
    def test_is_committed_verified_pruned_and_restored_like_the_new_one(self, is_sharded, tmp_path):
        options = {**OLD_FORMAT, "sharded": is_sharded, "max_to_keep": 2}

        assert [train_with(Supervisor, tmp_path, **options) for _ in range(3)] == [0, 3, 6]

        store = CheckpointStore(tmp_path, saver_files=tensorflow_files)
        assert [(one.step, one.is_committed) for one in store.candidates()] == [(9, True), (6, True)]
        data = "-00000-of-00001" if is_sharded else ""
        assert {path.name for path in tmp_path.glob("model.ckpt*")} == {
            f"model.ckpt-{step}{suffix}" for step in (6, 9) for suffix in (data, ".meta", ".manifest.json")
        }
        assert train_with(v1.train.Supervisor, tmp_path, **options) == 9
        store.verify(store.candidates()[0])
        cut(tmp_path / f"model.ckpt-9{data}", 0.5)
        with pytest.raises(CheckpointCorruptError):
            store.verify(store.candidates()[0])

    @pytest.mark.parametrize("then", [OLD_FORMAT, {}], ids=["the same", "the new one"])
    def test_of_tensorflows_own_supervisor_is_continued(self, then, is_sharded, tmp_path):
        train_with(v1.train.Supervisor, tmp_path, **OLD_FORMAT, sharded=is_sharded)

        assert train_with(Supervisor, tmp_path, **then, sharded=is_sharded) == 3
        assert train_with(Supervisor, tmp_path, **then, sharded=is_sharded) == 6

    @pytest.mark.parametrize("is_removed", [False, True], ids=["damaged", "missing"])
    def test_of_tensorflows_own_supervisor_is_no_fresh_start_when_it_is_not_good(
        self, is_removed, is_sharded, tmp_path
    ):
        train_with(v1.train.Supervisor, tmp_path, **OLD_FORMAT, sharded=is_sharded)
        data = tmp_path / f"model.ckpt-3{'-00000-of-00001' if is_sharded else ''}"
        if is_removed:
            data.unlink()
        else:
            cut(data, 0.5)

        with pytest.raises(NoGoodCheckpointError, match=r"model\.ckpt-3"):
            train_with(Supervisor, tmp_path, **OLD_FORMAT, sharded=is_sharded)

    def test_may_lie_where_the_logdir_was_copied_to(self, is_sharded, tmp_path):
        train_with(v1.train.Supervisor, tmp_path / "before", **OLD_FORMAT, sharded=is_sharded)
        shutil.move(tmp_path / "before", tmp_path / "now")

        assert train_with(Supervisor, tmp_path / "now", sharded=is_sharded) == 3

    def test_copied_under_a_newer_name_is_not_gone_on_with_before_what_was_committed(self, is_sharded, tmp_path):
        train_with(v1.train.Supervisor, tmp_path, **OLD_FORMAT, sharded=is_sharded)
        data = "-00000-of-00001" if is_sharded else ""
        shutil.copy(tmp_path / f"model.ckpt-3{data}", tmp_path / f"model.ckpt-60{data}")
        assert train_with(Supervisor, tmp_path, sharded=is_sharded) == 3
        pattern = "-?????-of-00001" if is_sharded else ""
        v1.train.update_checkpoint_state(str(tmp_path), str(tmp_path / f"model.ckpt-60{pattern}"))

        assert train_with(Supervisor, tmp_path, sharded=is_sharded) == 6
