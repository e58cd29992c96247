"""What a program holds of the objects in its state, such as a parameter group, is still theirs after a restore."""

from __future__ import annotations

import copy
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from stepguard.errors import CheckpointMismatchError
from stepguard.options import Guarding, Restoring, Saving
from stepguard.torch import Supervisor, Values

X = torch.linspace(-1, 1, 8).reshape(8, 1)


def session(state, logdir, **options):
    saving = Saving(save_model_secs=0, save_at_end=True)
    return Supervisor(state, logdir, saving=saving, save_summaries_secs=0, **options).managed_session()


def train(model, optimizer, x=X):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


class Sharpness(torch.optim.Optimizer):
    """It hands its groups to an optimizer inside, when it is made and when it is loaded, as SAM does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step(closure)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)
        self.param_groups = self.base.param_groups


class TestOptimizers:
    @pytest.mark.parametrize(
        "restoring", [Restoring(), Restoring(only=("model", "optimizer")), Restoring(hyperparameters="program")]
    )
    @pytest.mark.parametrize("kind", [lambda given: torch.optim.Adam(given, lr=0.1), Sharpness])
    def test_keep_their_groups(self, kind, restoring, tmp_path):
        for _ in range(2):
            model = nn.Linear(1, 1)
            optimizer = kind(model.parameters())
            groups, (group,), state = optimizer.param_groups, optimizer.param_groups, optimizer.state
            with session({"model": model, "optimizer": optimizer}, tmp_path, restoring=restoring) as sess:
                assert optimizer.param_groups is groups
                assert groups[0] is group
                assert optimizer.state is state
                if sess.global_step:
                    assert group["lr"] == 0.01
                for _ in sess.steps(max_steps=1):
                    train(model, optimizer)
                    group["lr"] = 0.01

    def test_keep_a_learning_rate_that_is_a_tensor(self, tmp_path):
        for _ in range(2):
            model, rate = nn.Linear(1, 1), torch.tensor(0.1)
            optimizer = torch.optim.Adam(model.parameters(), lr=rate)
            with session({"model": model, "optimizer": optimizer}, tmp_path) as sess:
                assert optimizer.param_groups[0]["lr"] is rate
                if sess.global_step:
                    assert rate.item() == torch.tensor(0.01).item()
                for _ in sess.steps(max_steps=1):
                    train(model, optimizer)
                    rate.fill_(0.01)

    def test_keep_their_groups_at_a_return_of_the_nan_guard(self, tmp_path):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        (group,), bad = optimizer.param_groups, [3]
        guarding = Guarding(nan_guard="return")
        options = {"save_summaries_secs": 0, "save_model_secs": 0, "save_model_steps": 1, "guarding": guarding}
        sv = Supervisor({"model": model, "optimizer": optimizer}, tmp_path, **options)
        with sv.managed_session() as sess:
            for _ in sess.steps(max_steps=5):
                assert sv._saving.writer.drain(20)
                assert optimizer.param_groups[0] is group
                assert group["lr"] == (0.1 if not sess.global_step else 0.5**sess.global_step)
                is_bad = sess.global_step in bad
                train(model, optimizer, X * (float("nan") if is_bad else 1))
                group["lr"] = 7.0 if is_bad else 0.5 ** (sess.global_step + 1)
                if is_bad:
                    bad.clear()
                sess.summary({"loss": model.weight.sum()})
        assert not bad

    def test_that_share_a_rate_in_the_program_get_the_two_that_were_saved(self, tmp_path):
        for _ in range(2):
            model, rate = nn.Linear(1, 1), torch.tensor(0.1)
            optimizer = torch.optim.Adam([{"params": [one], "lr": rate} for one in model.parameters()])
            with session({"model": model, "optimizer": optimizer}, tmp_path) as sess:
                if sess.global_step:
                    rates = [group["lr"].item() for group in optimizer.param_groups]
                    assert rates == pytest.approx([0.1, 0.01])
                for _ in sess.steps(max_steps=1):
                    optimizer.param_groups[1]["lr"] = torch.tensor(0.01)

    def test_keep_the_types_of_what_is_nested_in_their_state(self, tmp_path):
        for _ in range(2):
            model = nn.Linear(1, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with session({"model": model, "optimizer": optimizer}, tmp_path) as sess:
                if sess.global_step:
                    kept = optimizer.state[model.weight]
                    assert kept["factors"][0].tolist() == [1 / 3]
                    assert kept["factors"][1]["counts"].tolist() == [2**40 + 1]
                for _ in sess.steps(max_steps=1):
                    factors = [torch.tensor([1 / 3], dtype=torch.float64), {"counts": torch.tensor([2**40 + 1])}]
                    optimizer.state[model.weight]["factors"] = factors


class TestTensorsInValues:
    def test_stay_the_same_objects(self, tmp_path):
        for _ in range(2):
            prompt, queue = nn.Parameter(torch.zeros(2)), torch.zeros(2)
            weights = {"a": [torch.zeros(1, requires_grad=True)], "b": (torch.zeros(1, dtype=torch.int64),)}
            (first,), (second,) = weights["a"], weights["b"]
            values = Values(prompt=prompt, queue=queue, weights=weights)
            with session({"values": values}, tmp_path) as sess:
                assert values.prompt is prompt
                assert values.queue is queue
                assert values.weights["a"][0] is first
                assert values.weights["b"][0] is second
                assert first.requires_grad
                assert prompt.requires_grad
                if sess.global_step:
                    assert [one.tolist() for one in (prompt, queue, first, second)] == [[1, 1], [2, 2], [3], [4]]
                for _ in sess.steps(max_steps=1):
                    with torch.no_grad():
                        prompt += 1
                        queue += 2
                        first += 3
                        second += 4

    def test_that_the_run_has_replaced_leave_the_first_ones_as_they_are(self, tmp_path):
        for _ in range(2):
            images = torch.zeros(2, 1)
            values = Values(image=images[0], all=images)
            with session({"values": values}, tmp_path) as sess:
                assert images.tolist() == [[0], [0]]
                for _ in sess.steps(max_steps=1):
                    values.image = values.image + 1
        assert values.image.tolist() == [1]

    def test_that_have_grown_are_others_after_a_restore(self, tmp_path):
        for end in (1, 2):
            values = Values(seen=torch.zeros(0))
            with session({"values": values}, tmp_path) as sess:
                for step in sess.steps(max_steps=end):
                    values.seen = torch.cat([values.seen, torch.tensor([float(step)])])
        assert values.seen.tolist() == [0, 1]

    def test_that_the_program_builds_in_another_shape_are_refused(self, tmp_path):
        with session({"values": Values(queue=torch.zeros(2))}, tmp_path) as sess:
            for _ in sess.steps(max_steps=1):
                pass
        with (
            pytest.raises(CheckpointMismatchError, match=r"values\.queue \(expected \[3\], found \[2\]"),
            session({"values": Values(queue=torch.zeros(3))}, tmp_path),
        ):
            pass

    @pytest.mark.parametrize(
        "form",
        [
            lambda: torch.zeros(2, dtype=torch.float64),
            lambda: torch.zeros(1).expand(2),
            lambda: torch.zeros(2, requires_grad=True) * 2,
        ],
    )
    def test_of_another_form_are_others_after_a_restore(self, form, tmp_path):
        values = Values(queue=torch.ones(2))
        with session({"values": values}, tmp_path) as sess:
            for _ in sess.steps(max_steps=1):
                pass
        values = Values(queue=form())
        with session({"values": values}, tmp_path):
            assert values.queue.tolist() == [1, 1]
            assert values.queue.dtype is torch.float32

    def test_of_inference_mode_are_others_after_a_restore(self, tmp_path):
        for _ in range(2):
            with torch.inference_mode():
                values = Values(queue=torch.zeros(2))
            with session({"values": values}, tmp_path) as sess:
                if sess.global_step:
                    assert values.queue.tolist() == [1, 1]
                for _ in sess.steps(max_steps=1):
                    with torch.inference_mode():
                        values.queue += 1

    def test_of_each_process_stay_the_same_objects(self, tmp_path):
        for _ in range(2):
            queue = torch.zeros(2)
            values = Values(queue=queue, per_process=True)
            with session({"model": nn.Linear(1, 1), "values": values}, tmp_path) as sess:
                assert values.queue is queue
                if sess.global_step:
                    assert queue.tolist() == [2, 2]
                for _ in sess.steps(max_steps=1):
                    queue += 2

    def test_that_are_those_of_a_module_are_named_once(self, tmp_path, caplog):
        model, values = nn.Linear(1, 1), Values(best=None)
        options = {"save_summaries_secs": 0, "save_model_secs": 0, "save_model_steps": 1}
        with Supervisor({"model": model, "values": values}, tmp_path, **options).managed_session() as sess:
            for _ in sess.steps(max_steps=3):
                values.best = model.state_dict()
        assert caplog.text.count("values.best.weight (with model), values.best.bias (with model)") == 1

    @pytest.mark.parametrize("names", ["ab", "aa"])
    def test_that_share_their_memory_and_change_are_named(self, names, tmp_path, caplog):
        values = {"a": Values(bank=torch.zeros(6)), "b": Values()}
        with session(values, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                values[names[0]].bank = bank = torch.zeros(6)
                values[names[1]].head = bank[2:]
                bank += 1
        assert caplog.text.count(f"{names[1]}.head (with {names[0]}.bank)") == 1

    def test_that_share_their_memory_and_stay_as_they_are_or_apart_are_not_named(self, tmp_path, caplog):
        values = Values(rows=None, parts=None, pair=None)
        with session({"values": values}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                values.rows = list(torch.ones(4, 2))
                flat = torch.zeros(6)
                values.parts = flat[:2], flat[2:]
                flat += 1
                values.pair = [flat.clone().add_(1)] * 2
        assert not caplog.text

    def test_that_are_copies_of_those_of_a_module_are_not_named(self, tmp_path, caplog):
        model, values = nn.Linear(1, 1), Values(best=None)
        with session({"model": model, "values": values}, tmp_path) as sess:
            for _ in sess.steps(max_steps=1):
                values.best = copy.deepcopy(model.state_dict())
        assert not caplog.text


@pytest.mark.parametrize("per_process", [False, True])
def test_numbers_of_numpy_come_back_as_what_they_were(per_process, tmp_path):
    given = {
        "loss": np.float32(0.1),
        "count": np.int64(2**60),
        "is_best": np.bool_(True),
        "long": [np.float32(number) for number in range(300)],
        "nested": {"pair": (np.float64(0.1), 0.2), "array": torch.ones(1)},
    }
    values = Values(per_process=per_process)
    with session({"model": nn.Linear(1, 1), "values": values}, tmp_path) as sess:
        for _ in sess.steps(max_steps=1):
            for name, value in given.items():
                setattr(values, name, value)
    values = Values(per_process=per_process)
    with session({"model": nn.Linear(1, 1), "values": values}, tmp_path):
        assert vars(values) == given
        assert [type(value) for value in vars(values).values()] == [type(value) for value in given.values()]
        assert {type(value) for value in values.long} == {np.float32}
        assert [type(value) for value in values.nested["pair"]] == [np.float64, float]
    torch.load(next(tmp_path.glob("*.ckpt-1")) / "process-0.pt", weights_only=True)


class Remembering(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.queue = deque(maxlen=2)

    def get_extra_state(self):
        return {"queue": self.queue}

    def set_extra_state(self, state):
        self.queue = state["queue"]


@pytest.mark.parametrize("per_process", [False, True])
def test_deques_come_back_as_deques(per_process, tmp_path):
    given = {
        "losses": deque([1.0, 2.0], maxlen=3),
        "replays": deque([(torch.full((2,), float(number)), number) for number in range(300)], maxlen=300),
        "nested": [{"counts": deque([np.int64(1), deque()])}],
    }
    model, held = Remembering(), deque(maxlen=3)
    values = Values(per_process=per_process, losses=held)
    with session({"model": model, "values": values}, tmp_path) as sess:
        for _ in sess.steps(max_steps=1):
            model.queue.extend([1, 2, 3])
            vars(values).update(given)
    again = Remembering()
    values = Values(per_process=per_process, losses=held)
    with session({"model": again, "values": values}, tmp_path):
        assert (again.queue, again.queue.maxlen) == (deque([2, 3]), 2)
        assert values.losses is held
        assert (held, values.nested, values.nested[0]["counts"].maxlen) == (given["losses"], given["nested"], None)
        assert values.replays.maxlen == 300
        assert [(one.tolist(), number) for one, number in values.replays] == [([n, n], n) for n in range(300)]


def test_a_value_that_cannot_be_saved_is_named_with_the_way_out(tmp_path):
    with pytest.raises(TypeError, match=r"values\.seen: .* found builtins\.set, .*; keep its contents in one of those"):
        Supervisor({"model": nn.Linear(1, 1), "values": Values(seen={1})}, tmp_path)


@pytest.mark.parametrize("restoring", [Restoring(only=("best",)), Restoring(leave_out=("model.*",))])
def test_values_that_are_a_models_own_leave_it_alone_where_it_is_left_out(restoring, tmp_path):
    for weight, options in ((1.0, {}), (5.0, {"restoring": restoring})):
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, weight)
        with session({"model": model, "best": Values(best=model.state_dict())}, tmp_path, **options) as sess:
            assert model.weight.item() == weight
            for _ in sess.steps(max_steps=sess.global_step + 1):
                model(X)


class Guarded:
    """An object with slots that refuses all other attributes, as one whose parts are made later."""

    __slots__ = ("count", "parts")

    def __init__(self, *parts):
        self.count, self.parts = 0, parts

    def __getattr__(self, name):
        raise RuntimeError(f"{name} is not ready")

    def state_dict(self):
        return {"count": self.count, "parts": [one.state_dict() for one in self.parts]}

    def load_state_dict(self, state):
        self.count = state["count"]
        for one, saved in zip(self.parts, state["parts"], strict=True):
            one.load_state_dict(saved)


def test_an_object_with_slots_that_refuses_other_attributes_goes_on(tmp_path, caplog):
    for step in range(0, 4, 2):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.Adam(model.parameters())
        guarded = Guarded(model, optimizer)
        data = torch.utils.data.TensorDataset(torch.ones(8, 1))
        data.guarded = Guarded()
        with session({"guarded": guarded}, tmp_path) as sess:
            assert guarded.count == step
            for (x,) in sess.steps(torch.utils.data.DataLoader(data, batch_size=2), max_steps=step + 2):
                model(x).sum().backward()
                optimizer.step()
                guarded.count += 1
    assert guarded.count == 4
    assert not caplog.text
