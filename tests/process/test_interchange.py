"""Runs of TensorFlow's own Supervisor are continued by ours, and ours by TensorFlow's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from model import Model, read, wrong
from zygote import Zygote

from stepguard.options import Saving
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1

THEIRS, OURS = v1.train.Supervisor, Supervisor


def train(supervisor: Any, logdir: Path, steps: int, *, max_to_keep: int = 3) -> int:
    """Train so many steps under a Supervisor, saving after each; the step that it began at."""
    with tf.Graph().as_default():
        model = Model()
        saver = v1.train.Saver(max_to_keep=max_to_keep)
        options: dict[str, Any] = {"saving": Saving(save_model_steps=1)} if supervisor is OURS else {}
        sv = supervisor(
            logdir=str(logdir), saver=saver, save_model_secs=0, save_summaries_secs=0, summary_writer=None, **options
        )
        with sv.managed_session() as session:
            began = model.step(session)
            assert wrong(began, model.state(session)) == []
            for _ in range(steps):
                session.run(model.train_op)
                if supervisor is THEIRS:
                    saver.save(session, sv.save_path, global_step=sv.global_step)
    return began


def listed(logdir: Path) -> list[int]:
    """The steps of the checkpoints that TensorFlow's own tools list, each read and found right."""
    state = v1.train.get_checkpoint_state(str(logdir))
    steps = []
    for path in state.all_model_checkpoint_paths:
        assert v1.train.checkpoint_exists(path)
        values = read(path)
        assert wrong(int(values["global_step"]), values) == []
        steps.append(int(values["global_step"]))
    assert state.model_checkpoint_path == tf.train.latest_checkpoint(str(logdir))
    return steps


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestTurnAndTurnAbout:
    def test_each_goes_on_where_the_other_ended(self, tmp_path: Path) -> None:
        begun_at = [train(one, tmp_path, 4) for one in (THEIRS, OURS, THEIRS, OURS, OURS, THEIRS)]

        assert begun_at == [0, 4, 8, 12, 16, 20]

    @pytest.mark.parametrize(("first", "second"), [(THEIRS, OURS), (OURS, THEIRS)])
    def test_the_second_prunes_what_the_first_has_left(self, tmp_path: Path, first: Any, second: Any) -> None:
        train(first, tmp_path, 5)
        train(second, tmp_path, 2)

        newest = listed(tmp_path)
        assert newest[-1] == 7
        assert len(newest) == 3
        present = sorted(int(one.stem.rpartition("-")[2]) for one in tmp_path.glob("*.index"))
        assert present == newest

    def test_manifests_that_theirs_has_left_behind_do_not_disturb_ours(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """TensorFlow's Saver does not know of manifests: it leaves those of the checkpoints that it prunes."""
        train(OURS, tmp_path, 5)
        train(THEIRS, tmp_path, 5)

        assert train(OURS, tmp_path, 1) == 10

        assert [one.getMessage() for one in caplog.records if "damaged" in one.getMessage()] == []

    def test_a_step_of_ours_that_theirs_has_written_again_is_no_damage(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The manifest describes what was there before; that all of it is newer tells this from damage."""
        train(OURS, tmp_path, 3)
        kept = train(OURS, tmp_path, 0)
        with tf.Graph().as_default():
            model = Model()
            saver = v1.train.Saver()
            with v1.Session() as session:
                session.run(v1.global_variables_initializer())
                session.run(model.train_op)
                saver.save(session, str(tmp_path / "model.ckpt"), global_step=kept)

        assert train(OURS, tmp_path, 0) == 1

        assert [one.getMessage() for one in caplog.records if "damaged" in one.getMessage()] == []


def test_after_our_retention_and_a_kill_theirs_goes_on(tensorflow_children: Zygote, tmp_path: Path) -> None:
    for _ in range(3):
        child = tensorflow_children.start("train", logdir=str(tmp_path))
        child.wait_for("saved", count=4)
        child.kill()
    acknowledged = child.reports("saved")[-1]["step"]
    newest_good = CheckpointStore(tmp_path, saver_files=tensorflow_files).newest_good(quarantine=False)
    assert newest_good.checkpoint is not None
    assert newest_good.damaged == ()

    began = train(THEIRS, tmp_path, 2, max_to_keep=2)

    # Theirs knows only the state file, which is written right after the commit.
    assert acknowledged <= began <= newest_good.checkpoint.step
    assert train(OURS, tmp_path, 1, max_to_keep=2) >= began + 2
