"""Every file of a checkpoint flipped, cut, emptied, removed: never loaded wrong, resumed from the newest good one."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from model import Model, wrong

from stepguard import options as groups
from stepguard.errors import CheckpointCorruptError, CheckpointError, NoGoodCheckpointError
from stepguard.store import Checkpoint, CheckpointStore, tensorflow_files
from stepguard.tensorflow import SessionManager, Supervisor

v1 = tf.compat.v1

STEPS = (3, 6, 9)
NEWEST, BEFORE = STEPS[-1], STEPS[-2]
FILES = ("index", "data-00000-of-00001", "manifest.json")

Damage = Callable[[bytes], bytes]


def flips(size: int, count: int = 50) -> list[Damage]:
    """Damages that flip one bit each: at both ends of the file, and anywhere between."""
    chance = random.Random(size)
    places = sorted({0, size - 1, *(chance.randrange(size) for _ in range(4 * count))})
    chosen = {0, size - 1, *chance.sample(places, min(count, len(places)) - 2)}

    def flip(place: int, bit: int) -> Damage:
        return lambda content: content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]

    return [flip(place, chance.randrange(8)) for place in sorted(chosen)]


def cuts(size: int, count: int = 50) -> list[Damage]:
    """Damages that leave only the beginning of a file, from nothing to all but the last byte."""
    chance = random.Random(size)
    lengths = sorted({0, 1, size - 1, size // 2, *(chance.randrange(size) for _ in range(count - 4))})

    def cut(length: int) -> Damage:
        return lambda content: content[:length]

    return [cut(length) for length in lengths]


@dataclass(frozen=True)
class Run:
    """A logdir with the checkpoints of three steps, to be copied and damaged."""

    original: Path
    copy: Path

    def fresh(self) -> Path:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.original, self.copy)
        return self.copy

    def damages(self, suffix: str) -> list[Damage]:
        size = (self.original / f"model.ckpt-{NEWEST}.{suffix}").stat().st_size
        return [*flips(size), *cuts(size)]


def train(logdir: Path, supervisor: Callable[..., Any], **options: Any) -> None:
    """Leave checkpoints of the three steps, and of nothing else."""
    with tf.Graph().as_default():
        model = Model()
        saver = v1.train.Saver()
        sv = supervisor(
            logdir=str(logdir), saver=saver, save_model_secs=0, save_summaries_secs=0, summary_writer=None, **options
        )
        with sv.managed_session() as session:
            for step in range(1, NEWEST + 1):
                session.run(model.train_op)
                if step in STEPS and supervisor is not Supervisor:
                    saver.save(session, sv.save_path, global_step=sv.global_step)


@pytest.fixture(scope="module")
def ours(memory_path: Path) -> Run:
    """Checkpoints of our Supervisor, each with its manifest."""
    logdir = memory_path / "ours"
    for last in STEPS:
        with tf.Graph().as_default():
            model = Model()
            sv = Supervisor(
                logdir=str(logdir),
                save_model_secs=0,
                saving=groups.Saving(save_at_end=True),
                save_summaries_secs=0,
                summary_writer=None,
            )
            with sv.managed_session() as session:
                while model.step(session) < last:
                    session.run(model.train_op)
    assert [one.step for one in CheckpointStore(logdir).candidates()] == [9, 6, 3]
    return Run(logdir, memory_path / "copy-of-ours" / "run")


@pytest.fixture(scope="module")
def theirs(memory_path: Path) -> Run:
    """Checkpoints of TensorFlow's own Saver and Supervisor, without manifests."""
    logdir = memory_path / "theirs"
    train(logdir, v1.train.Supervisor)
    assert not list(logdir.glob("*.manifest.json"))
    return Run(logdir, memory_path / "copy-of-theirs" / "run")


class Restoring:
    """One graph with its Supervisor's parts, to restore many logdirs with: a new session for each."""

    def __init__(self) -> None:
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.model = Model()
            self.saver = v1.train.Saver()
            self.init_op = v1.global_variables_initializer()
        self.graph.finalize()

    def step(self, logdir: Path) -> int:
        """The step that a chief resumes from; everything in the model is what it is at that step."""
        from stepguard.tensorflow.checkpoint.restore import ENGINE, Restorer

        store = CheckpointStore(logdir, engine=ENGINE, saver_files=tensorflow_files)
        manager = SessionManager(graph=self.graph, restorer=Restorer(store))
        with manager.prepare_session("", self.init_op, self.saver, str(logdir)) as session:
            state = self.model.state(session)
        step = int(state["global_step"])
        assert wrong(step, state) == []
        return step


@pytest.fixture(scope="module")
def restoring() -> Restoring:
    return Restoring()


def start(logdir: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    """Start a whole Supervisor there; the step that it begins at, and its state."""
    with tf.Graph().as_default():
        model = Model()
        sv = Supervisor(
            logdir=str(logdir),
            save_summaries_secs=0,
            summary_writer=None,
            **{"saving": groups.Saving(save_model_secs=0, save_at_end=False), **options},
        )
        with sv.managed_session() as session:
            state = model.state(session)
        return int(state["global_step"]), state


def attempt(
    store: CheckpointStore, checkpoint: Checkpoint
) -> tuple[Checkpoint, None] | tuple[None, CheckpointCorruptError]:
    """What a verification says, one way or the other."""
    try:
        return store.verify(checkpoint), None
    except CheckpointCorruptError as error:
        return None, error


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        one.getMessage()
        for one in caplog.records
        if one.name.startswith("stepguard") and one.levelno >= logging.WARNING
    ]


def everything_in(directory: Path) -> dict[str, bytes]:
    found = {str(one.relative_to(directory)): one.read_bytes() for one in directory.rglob("*") if one.is_file()}
    # What tells of a start, also of one that failed.
    return {
        name: content for name, content in found.items() if not name.startswith(("run.jsonl", "heartbeats/", "traces/"))
    }


class TestACommittedCheckpoint:
    @pytest.mark.parametrize("suffix", FILES)
    def test_with_any_bit_flipped_or_cut_anywhere_is_not_taken_for_good(self, ours: Run, suffix: str) -> None:
        logdir = ours.fresh()
        path = logdir / f"model.ckpt-{NEWEST}.{suffix}"
        content = path.read_bytes()
        store = CheckpointStore(logdir, saver_files=tensorflow_files)
        newest = store.candidates()[0]
        whole = store.verify(newest)
        damages = ours.damages(suffix)
        assert len(damages) >= 90
        unnoticed = 0
        for damage in damages:
            path.write_bytes(damage(content))
            verified, error = attempt(store, newest)
            if error is not None:
                assert error.path == path
            else:
                # Without its last line break, or with another last digit of the time, which is the same number.
                assert suffix == "manifest.json"
                assert verified is not None
                assert verified.manifest == whole.manifest
                unnoticed += 1
                continue
            recovery = store.newest_good(quarantine=False)
            assert recovery.checkpoint is not None
            assert recovery.checkpoint.step == BEFORE
        assert unnoticed <= 4

    @pytest.mark.parametrize("kind", ["flipped", "cut", "emptied", "removed"])
    @pytest.mark.parametrize("suffix", FILES)
    def test_damaged_costs_a_step_back_and_one_warning(
        self, ours: Run, suffix: str, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        logdir = ours.fresh()
        path = logdir / f"model.ckpt-{NEWEST}.{suffix}"
        content = path.read_bytes()
        middle = len(content) // 2
        if kind == "removed":
            path.unlink()
        else:
            damaged = {
                "flipped": content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :],
                "cut": content[:middle],
                "emptied": b"",
            }
            path.write_bytes(damaged[kind])

        step, state = start(logdir)

        assert wrong(step, state) == []
        if (suffix, kind) == ("manifest.json", "removed"):
            # It is a checkpoint as TensorFlow's own Saver leaves it, and all of it is there.
            assert step == NEWEST
            return
        assert step == BEFORE
        (warning,) = warnings_in(caplog)
        quarantine = logdir / "quarantine" / f"model.ckpt-{NEWEST}"
        assert str(path) in warning
        assert str(quarantine) in warning
        assert f"{NEWEST - BEFORE} steps earlier" in warning
        assert not list(logdir.glob(f"model.ckpt-{NEWEST}*"))
        assert (quarantine / "reason.txt").exists()
        assert start(logdir)[0] == BEFORE
        assert not list((logdir / "quarantine").glob("*.1")), "quarantined twice"

    def test_two_damaged_ones_cost_two_steps_back(self, ours: Run, caplog: pytest.LogCaptureFixture) -> None:
        logdir = ours.fresh()
        (logdir / f"model.ckpt-{NEWEST}.index").write_bytes(b"")
        (logdir / f"model.ckpt-{BEFORE}.data-00000-of-00001").write_bytes(b"")

        step, state = start(logdir)

        assert step == STEPS[0]
        assert wrong(step, state) == []
        (warning,) = warnings_in(caplog)
        for lost in (NEWEST, BEFORE):
            assert f"model.ckpt-{lost}" in warning
        assert f"{NEWEST - STEPS[0]} steps earlier" in warning

    def test_swapped_with_another_ones_file_is_not_loaded(self, ours: Run, caplog: pytest.LogCaptureFixture) -> None:
        """Each file is whole, and TensorFlow would load a mixture of two steps."""
        logdir = ours.fresh()
        for suffix in ("index", "data-00000-of-00001"):
            shutil.copy(logdir / f"model.ckpt-{STEPS[0]}.{suffix}", logdir / f"model.ckpt-{NEWEST}.{suffix}")

        assert start(logdir)[0] == BEFORE
        assert len(warnings_in(caplog)) == 1


class TestACheckpointOfTensorFlowsOwn:
    """No manifest says what its bytes were: TensorFlow's checksums, of each tensor and of the index, are the proof."""

    @pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001"])
    def test_with_any_bit_flipped_or_cut_anywhere_is_never_loaded_wrong(
        self, theirs: Run, suffix: str, restoring: Restoring
    ) -> None:
        content = (theirs.original / f"model.ckpt-{NEWEST}.{suffix}").read_bytes()
        unnoticed = 0
        for damage in theirs.damages(suffix):
            logdir = theirs.fresh()
            (logdir / f"model.ckpt-{NEWEST}.{suffix}").write_bytes(damage(content))
            # `step` compares all values with those of the step that was restored.
            step = restoring.step(logdir)
            assert step in (NEWEST, BEFORE)
            unnoticed += step == NEWEST
        # The index ends in a footer with bytes that mean nothing.
        assert unnoticed <= (10 if suffix == "index" else 0)

    def test_whose_meta_graph_is_damaged_is_as_good_as_before(self, theirs: Run, restoring: Restoring) -> None:
        """The meta graph has no checksum, and restoring into a graph that exists does not read it."""
        content = (theirs.original / f"model.ckpt-{NEWEST}.meta").read_bytes()
        for damage in theirs.damages("meta")[::10]:
            logdir = theirs.fresh()
            (logdir / f"model.ckpt-{NEWEST}.meta").write_bytes(damage(content) or b"x")
            assert restoring.step(logdir) == NEWEST

    @pytest.mark.parametrize("kind", ["flipped", "cut", "emptied", "removed"])
    @pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001"])
    def test_damaged_costs_a_step_back_and_one_warning(
        self, theirs: Run, suffix: str, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        logdir = theirs.fresh()
        path = logdir / f"model.ckpt-{NEWEST}.{suffix}"
        content = path.read_bytes()
        middle = len(content) // 2
        if kind == "removed":
            path.unlink()
        else:
            damaged = {
                "flipped": content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :],
                "cut": content[:middle],
                "emptied": b"",
            }
            path.write_bytes(damaged[kind])

        step, state = start(logdir)

        assert step == BEFORE
        assert wrong(step, state) == []
        (warning,) = warnings_in(caplog)
        assert f"model.ckpt-{NEWEST}" in warning
        assert f"{NEWEST - BEFORE} steps earlier" in warning


STATE_FILES = {
    "missing": None,
    "empty": b"",
    "garbage": bytes(range(256)) * 4,
    "cut": b'model_checkpoint_path: "/some/where/model.ck',
    "stale": b'model_checkpoint_path: "model.ckpt-3"\nall_model_checkpoint_paths: "model.ckpt-3"\n',
    "of a run elsewhere": b'model_checkpoint_path: "/gone/model.ckpt-9"\n',
}


@pytest.mark.parametrize("kind", STATE_FILES)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_whatever_the_state_file_says_the_newest_is_found(
    whose: str, kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    run: Run = request.getfixturevalue(whose)
    logdir = run.fresh()
    content = STATE_FILES[kind]
    if content is None:
        (logdir / "checkpoint").unlink()
    else:
        (logdir / "checkpoint").write_bytes(content)

    step, state = start(logdir)

    assert step == NEWEST
    assert wrong(step, state) == []
    assert warnings_in(caplog) == []


def test_a_newest_checkpoint_that_only_the_state_file_knows_is_missed_and_said(
    ours: Run, caplog: pytest.LogCaptureFixture
) -> None:
    logdir = ours.fresh()
    for one in logdir.glob(f"model.ckpt-{NEWEST}*"):
        one.unlink()

    assert start(logdir)[0] == BEFORE

    (warning,) = warnings_in(caplog)
    assert f"model.ckpt-{NEWEST}" in warning


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_logdir_that_was_moved_is_resumed_where_it_is_now(
    whose: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: Run = request.getfixturevalue(whose)
    assert str(run.original) in (run.original / "checkpoint").read_text(), "the paths in it should be absolute"
    moved = tmp_path / "moved"
    shutil.copytree(run.original, moved)
    # Where the paths lead now, somebody else trains something else.
    before = everything_in(run.original)

    assert start(moved)[0] == NEWEST

    assert everything_in(run.original) == before


class TestHalfOfACheckpoint:
    def test_that_a_killed_save_left_is_not_resumed_from(self, ours: Run, caplog: pytest.LogCaptureFixture) -> None:
        logdir = ours.fresh()
        stage = logdir / ".stage-model.ckpt-12"
        stage.mkdir()
        for one in logdir.glob(f"model.ckpt-{NEWEST}.*"):
            shutil.copy(one, stage / one.name.replace(f"-{NEWEST}", "-12"))
        shutil.copy(logdir / f"model.ckpt-{NEWEST}.data-00000-of-00001", logdir / "model.ckpt-12.data-00000-of-00001")

        assert start(logdir, saving=groups.Saving(save_model_steps=1000))[0] == NEWEST
        assert warnings_in(caplog) == []
        assert not stage.exists()

    @pytest.mark.parametrize("left", ["data", "index", "meta"])
    def test_that_tensorflows_saver_left_is_not_resumed_from(self, theirs: Run, left: str) -> None:
        logdir = theirs.fresh()
        for one in logdir.glob(f"model.ckpt-{NEWEST}.{left}*"):
            shutil.copy(one, logdir / one.name.replace(f"-{NEWEST}", "-12"))

        assert start(logdir)[0] == NEWEST

    @pytest.mark.parametrize("gone", [["manifest"], ["manifest", "index"], ["manifest", "index", "data"]])
    def test_that_a_killed_pruning_left_is_passed_over(
        self, ours: Run, gone: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        logdir = ours.fresh()
        oldest = f"model.ckpt-{STEPS[0]}"
        shutil.copy(logdir / f"{oldest}.manifest.json", logdir / f".pruned-{oldest}")
        for suffix in gone:
            for one in logdir.glob(f"{oldest}.{suffix}*"):
                one.unlink()

        assert start(logdir, saving=groups.Saving(save_model_steps=1000))[0] == NEWEST

        assert warnings_in(caplog) == []
        assert not list(logdir.glob(f"{oldest}*"))
        assert not list(logdir.glob(".pruned-*"))


class TestWhenAllAreDamaged:
    @staticmethod
    def damage_all(logdir: Path) -> None:
        for one in logdir.glob("model.ckpt-*.data-*"):
            one.write_bytes(one.read_bytes()[:-1])

    @pytest.mark.parametrize("whose", ["ours", "theirs"])
    def test_the_run_does_not_start_over_and_changes_nothing(self, whose: str, request: pytest.FixtureRequest) -> None:
        run: Run = request.getfixturevalue(whose)
        logdir = run.fresh()
        self.damage_all(logdir)
        before = everything_in(logdir)

        for _ in range(2):
            with pytest.raises(NoGoodCheckpointError, match="start over"):
                start(logdir)

        after = everything_in(logdir)
        after.pop(".stepguard.lock", None)
        before.pop(".stepguard.lock", None)
        assert after == before

    def test_it_starts_over_when_that_is_asked_for(self, ours: Run, caplog: pytest.LogCaptureFixture) -> None:
        logdir = ours.fresh()
        self.damage_all(logdir)

        step, state = start(logdir, restoring=groups.Restoring(start_over_when_all_damaged=True))

        assert step == 0
        assert wrong(0, state) == []
        assert warnings_in(caplog)
        assert sorted(one.name for one in (logdir / "quarantine").iterdir()) == [
            "checkpoint",
            *(f"model.ckpt-{one}" for one in STEPS),
        ]
        # Once is enough: nothing is damaged any more.
        assert start(logdir)[0] == 0

    def test_asking_to_start_over_costs_nothing_while_one_is_good(self, ours: Run) -> None:
        logdir = ours.fresh()
        (logdir / f"model.ckpt-{NEWEST}.index").write_bytes(b"")

        assert start(logdir, restoring=groups.Restoring(start_over_when_all_damaged=True))[0] == BEFORE


def test_a_manifest_of_a_newer_stepguard_is_not_damage(ours: Run) -> None:
    import json

    from stepguard.store.manifest import Manifest

    logdir = ours.fresh()
    path = logdir / f"model.ckpt-{NEWEST}.manifest.json"
    manifest = Manifest.from_json(path.read_bytes(), path)
    newer = Manifest(manifest.name, manifest.engine, manifest.step, manifest.time, manifest.files, manifest.extra, 99)
    path.write_bytes(newer.to_json())
    assert json.loads(path.read_bytes())["format_version"] == 99
    before = everything_in(logdir)

    with pytest.raises(CheckpointError, match="newer"):
        start(logdir)

    after = everything_in(logdir)
    assert {name: after[name] for name in before} == before
