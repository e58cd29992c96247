"""Checkpoints read beside their run, and taken for the first weights of another one."""

from __future__ import annotations

import contextlib
import logging
import threading

import pytest
import torch
from torch import nn

from stepguard.errors import CheckpointCorruptError, CheckpointMismatchError, NoGoodCheckpointError
from stepguard.options import Restoring
from stepguard.torch import Supervisor, Values, load, newest


def save_every(logdir, steps=3, keep=5):
    """Train one run on which saves each step, in which the weight is the step."""
    model = nn.Linear(1, 1, bias=False)
    sv = Supervisor({"model": model, "values": Values(best=2)}, logdir, max_to_keep=keep)
    for step in range(1, steps + 1):
        session = sv.prepare_or_wait_for_session()
        for _ in session.steps(max_steps=step):
            with torch.no_grad():
                model.weight.fill_(step)
        sv.stop()
        session.close()


@pytest.mark.parametrize("place", ["s3://bucket/run", "gs:/bucket/run"])
def test_a_place_in_another_store_is_refused_by_name(place):
    for read in (
        load,
        newest,
        lambda place: Restoring(init_from=place),
        lambda place: Restoring(init_from={"m": place}),
    ):
        with pytest.raises(ValueError, match=f"got '{place}', which is in another store"):
            read(place)


class TestACheckpoint:
    def test_is_read_as_plain_states_by_its_step_or_as_the_newest(self, tmp_path):
        save_every(tmp_path)
        found = load(tmp_path)

        assert found.step == 3
        assert found.path == tmp_path / "model.ckpt-3"
        assert found["model"]["weight"].item() == 3
        assert found["values"] == {"best": 2}
        assert load(tmp_path, 2)["model"]["weight"].item() == 2
        assert load(tmp_path / "model.ckpt-1").step == 1
        nn.Linear(1, 1, bias=False).load_state_dict(found["model"])

    def test_that_is_not_there_is_named_with_those_that_are(self, tmp_path):
        save_every(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"step 7.*found the steps: 3, 2, 1, 0"):
            load(tmp_path, 7)
        with pytest.raises(FileNotFoundError, match="none"):
            load(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="'latest'"):
            load(tmp_path, "latest")

    def test_that_is_damaged_costs_a_step_back_when_the_newest_is_asked_for(self, tmp_path, caplog):
        save_every(tmp_path)
        damage(tmp_path / "model.ckpt-3" / "model.pt")
        assert load(tmp_path).step == 2
        assert "model.ckpt-3" in caplog.text
        with pytest.raises(CheckpointCorruptError, match="digest"):
            load(tmp_path, 3)
        for step in (0, 1, 2):
            damage(tmp_path / f"model.ckpt-{step}" / "model.pt")
        with pytest.raises(NoGoodCheckpointError):
            load(tmp_path)

    def test_is_read_while_its_run_saves_and_prunes_as_fast_as_it_can(self, tmp_path):
        save_every(tmp_path, 1)
        ended = threading.Event()

        def read() -> list[tuple[int, float]]:
            found = []
            while not ended.is_set() or not found:
                states = load(tmp_path)
                found.append((states.step, states["model"]["weight"].item()))
            return found

        results: list[object] = []
        reader = threading.Thread(target=lambda: results.append(_outcome(read)))
        reader.start()
        save_every(tmp_path, 60, keep=1)
        ended.set()
        reader.join()

        (found,) = results
        assert isinstance(found, list), found
        assert all(step == weight for step, weight in found)
        assert len({step for step, _ in found}) > 1


def _outcome(call):
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - a thread's edge
        return error


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Net(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.body = nn.Linear(1, 2)
        self.head = nn.Linear(2, outputs)


class TestTheFirstWeights:
    def begin(self, logdir, model, **options):
        sv = Supervisor({"model": model, "values": Values(best=9)}, logdir, restoring=Restoring(**options))
        with sv.managed_session() as session:
            at = session.global_step
            for _ in session.steps(max_steps=1):
                pass
        return at

    @pytest.fixture
    def source(self, tmp_path):
        model = Net()
        with Supervisor({"model": model}, tmp_path / "first").managed_session() as session:
            for _ in session.steps(max_steps=4):
                with torch.no_grad():
                    model.body.weight += 1
        return model

    @pytest.mark.parametrize("place", ["a logdir", "a checkpoint", "a file", "a nested file", "a wrapped file"])
    def test_are_those_of_another_run_and_its_steps_are_not_counted(self, tmp_path, source, place):
        state, file = source.state_dict(), tmp_path / "weights.pt"
        torch.save(
            {
                "a nested file": {"epoch": 3, "state_dict": state},
                "a wrapped file": {f"module.{key}": part for key, part in state.items()},
            }.get(place, dict(state)),
            file,
        )
        paths = {"a logdir": tmp_path / "first", "a checkpoint": tmp_path / "first" / "model.ckpt-4"}
        model = Net()
        at = self.begin(tmp_path / "second", model, init_from=paths.get(place, file))

        assert at == 0
        assert torch.equal(model.body.weight, source.body.weight)
        assert torch.equal(model.head.weight, source.head.weight)

    def test_are_taken_once_and_not_over_what_was_learned_since(self, tmp_path, source):
        self.begin(tmp_path / "second", Net(), init_from=tmp_path / "first")
        model = Net()
        sv = Supervisor({"model": model}, tmp_path / "third", restoring=Restoring(init_from=tmp_path / "first"))
        with sv.managed_session() as session:
            for _ in session.steps(max_steps=1):
                with torch.no_grad():
                    model.body.weight.zero_()
        again = Net()
        sv = Supervisor({"model": again}, tmp_path / "third", restoring=Restoring(init_from=tmp_path / "first"))
        with sv.managed_session() as session:
            assert session.global_step == 1
        assert not again.body.weight.any()

    def test_that_do_not_fit_are_refused_or_taken_as_far_as_they_do(self, tmp_path, source, caplog):
        model = Net(outputs=3)
        before = model.body.weight.clone()
        with pytest.raises(CheckpointMismatchError, match=r"model\.head\.weight.*init_fit='part'"):
            self.begin(tmp_path / "second", model, init_from=tmp_path / "first")
        assert torch.equal(before, model.body.weight)

        head = model.head.weight.clone()
        with caplog.at_level(logging.WARNING):
            self.begin(tmp_path / "second", model, init_from=tmp_path / "first", init_fit="part")
        assert torch.equal(model.body.weight, source.body.weight)
        assert torch.equal(head, model.head.weight)
        assert "2 of 4 first weights" in caplog.text
        assert "head.weight" in caplog.text

    @pytest.mark.parametrize("fit", ["whole", "part"])
    @pytest.mark.parametrize(
        ("prefix", "way_out"),
        [
            ("backbone.", "'backbone.body.weight' may be 'body.weight' under another prefix"),
            ("other_", "is it of this model?"),
        ],
    )
    def test_of_which_nothing_fits_are_not_offered_in_part(self, prefix, way_out, fit, tmp_path):
        torch.save({prefix + key: one for key, one in Net().state_dict().items()}, tmp_path / "weights.pt")
        with pytest.raises(CheckpointMismatchError, match="there is nothing to take") as raised:
            self.begin(tmp_path / "second", Net(), init_from=tmp_path / "weights.pt", init_fit=fit)

        assert way_out in str(raised.value)
        assert "init_fit" not in str(raised.value)

    def test_may_come_from_a_place_for_each_part(self, tmp_path, source):
        model, teacher = Net(), Net()
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        sv = Supervisor(
            {"model": model, "teacher": teacher},
            tmp_path / "second",
            restoring=Restoring(init_from={"teacher": tmp_path / "weights.pt"}),
        )
        with sv.managed_session():
            assert torch.equal(teacher.body.weight, source.body.weight)
            assert not torch.equal(model.body.weight, source.body.weight)

    def test_that_are_not_there_are_an_error(self, tmp_path):
        (tmp_path / "empty").mkdir()
        for place in ("nowhere", "nowhere.pt", "nowhere.safetensors", "empty"):
            with pytest.raises(FileNotFoundError, match=f"init_from: .* found none at .*{place}"):
                self.begin(tmp_path / "second", Net(), init_from=tmp_path / place)

    def test_for_a_part_that_is_none_are_an_error(self, tmp_path, source):
        with pytest.raises(CheckpointMismatchError, match="teacher"):
            self.begin(tmp_path / "second", Net(), init_from={"teacher": tmp_path / "first"})


class TestASessionThatWasOpenedByHand:
    def test_is_ended_with_its_last_step_saved_when_another_supervisor_takes_the_logdir(self, tmp_path, caplog):
        first = nn.Linear(1, 1)
        sv = Supervisor({"model": first}, tmp_path)
        session = sv.prepare_or_wait_for_session()
        for _ in session.steps(max_steps=3):
            pass

        second = nn.Linear(1, 1)
        with Supervisor({"model": second}, tmp_path).managed_session() as other:
            assert other.global_step == 3
            assert torch.equal(first.weight, second.weight)
            assert not session.is_open
            assert sv.should_stop()
        assert "an earlier session of this process, at step 3" in caplog.text

    @pytest.mark.parametrize("wrapped", [iter, enumerate, lambda loop: (one for one in loop)])
    @pytest.mark.parametrize("left", ["before", "after backward", "in a function", "finally", "break", "return"])
    def test_counts_the_step_in_which_its_loop_was_left_unless_by_an_error(self, left, wrapped, tmp_path):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def fail():
            raise ZeroDivisionError

        def cell():
            sv = Supervisor({"model": model, "optimizer": optimizer}, tmp_path, save_model_steps=2, save_model_secs=0)
            session = sv.prepare_or_wait_for_session()
            try:
                for _ in wrapped(session.steps()):
                    if session.global_step == 3 and left == "before":
                        raise ZeroDivisionError
                    model(torch.ones(1, 1)).sum().backward()
                    if session.global_step == 3 and left == "after backward":
                        1 / 0  # noqa: B018
                    optimizer.step()
                    optimizer.zero_grad()
                    if session.global_step == 3:
                        if left in ("in a function", "finally"):
                            fail()
                        if left == "return":
                            return
                        break
            finally:
                if left == "finally":
                    sv.stop()

        with contextlib.suppress(ZeroDivisionError):
            cell()
        with Supervisor(
            {"model": nn.Linear(1, 1)}, tmp_path, restoring=Restoring(only=["model"])
        ).managed_session() as again:
            assert again.global_step == (4 if left in ("break", "return") else 2)

    def test_saves_nothing_after_an_error_until_the_program_takes_another_step(self, tmp_path, caplog):
        sv = Supervisor({"model": nn.Linear(1, 1)}, tmp_path)
        session = sv.prepare_or_wait_for_session()
        with contextlib.suppress(ZeroDivisionError):
            for _ in session.steps():
                raise ZeroDivisionError
        session.save()
        assert "a step was left half-way by an error" in caplog.text
        for _ in session.steps():
            break
        sv.stop()

        assert newest(tmp_path).step == 2
