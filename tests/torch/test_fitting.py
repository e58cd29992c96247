"""A checkpoint meets a program that was changed: each part gets what was its own, or what differs is said."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from stepguard.errors import CheckpointMismatchError
from stepguard.options import Restoring, Saving
from stepguard.torch import Supervisor, Values, newest

SEED = 7


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(inputs).pow(2).mean().backward()
    optimizer.step()


def train(state: dict[str, Any], logdir: Any, until: int, **options: Any) -> Supervisor:
    """Train ``state["model"]`` with ``state["optimizer"]``, as far as there are such, to the step ``until``."""
    sv = Supervisor(state, logdir, save_model_secs=0, save_model_steps=until, **options)
    with sv.managed_session() as session:
        for _ in session.steps(max_steps=until):
            if "optimizer" in state:
                generator = torch.Generator().manual_seed(session.global_step)
                step(state["model"], state["optimizer"], torch.randn(4, 3, generator=generator))
            if "scheduler" in state:
                state["scheduler"].step()
    return sv


def warnings_in(caplog) -> str:
    return "\n".join(one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)


class Decay:
    def __init__(self, steps):
        self.steps = steps

    def factor(self, at):
        return 1 - at / self.steps


def decay_of(args):
    if isinstance(args, dict):
        return lambda at: 1 - at / args["steps"]
    return lambda at: 1 - at / args.steps


def decay_by_global(steps):
    global STEPS
    STEPS = steps
    return lambda at: 1 - at / STEPS


class Pair(nn.Module):
    """Two layers of the same shape, built in either order."""

    def __init__(self, names=("a", "b")):
        super().__init__()
        torch.manual_seed(SEED)
        for name in names:
            setattr(self, name, nn.Linear(3, 3, bias=False))

    def forward(self, x):
        return self.b(self.a(x))


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        name: optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in model.named_parameters()
        if "exp_avg" in optimizer.state[parameter]
    }


class TestMoments:
    @pytest.mark.parametrize("is_named", [True, False])
    def test_go_to_the_parameter_that_they_were_kept_for_when_layers_are_built_in_another_order(
        self, tmp_path, is_named
    ):
        def build(*names):
            model = Pair(names)
            parameters = model.named_parameters() if is_named else model.parameters()
            return {"model": model, "optimizer": torch.optim.AdamW(parameters, lr=0.01)}

        first = build("a", "b")
        train(first, tmp_path, 3)
        other = build("b", "a")
        train(other, tmp_path, 3)

        kept, restored = moments(first["model"], first["optimizer"]), moments(other["model"], other["optimizer"])
        assert kept.keys() == restored.keys() == {"a.weight", "b.weight"}
        assert all(torch.equal(kept[name], restored[name]) for name in kept)
        assert not torch.equal(kept["a.weight"], kept["b.weight"])

    def test_go_with_a_parameter_that_is_in_another_group_now(self, tmp_path):
        def build(*groups):
            model = Pair()
            named = dict(model.named_parameters())
            parameters = [{"params": [named[name] for name in group]} for group in groups]
            return {"model": model, "optimizer": torch.optim.AdamW(parameters, lr=0.01)}

        first = build(["a.weight"], ["b.weight"])
        train(first, tmp_path, 3)
        other = build(["b.weight"], ["a.weight"])
        train(other, tmp_path, 3)

        kept, restored = moments(first["model"], first["optimizer"]), moments(other["model"], other["optimizer"])
        assert all(torch.equal(kept[name], restored[name]) for name in kept)

    @pytest.mark.parametrize("rate", [0.1, 0.2])
    def test_are_told_of_in_a_group_of_other_options(self, rate, tmp_path, caplog):
        for first in (1, 2):
            model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
            groups = [[*model[:first].parameters()], [*model[first:].parameters()]]
            optimizer = torch.optim.Adam([{"params": groups[0], "lr": rate}, {"params": groups[1]}], lr=0.1)
            train({"model": model, "optimizer": optimizer}, tmp_path, first)
        said = "optimizer: model.1.weight (group 0 in the program, 1 in the checkpoint)"
        assert (said in warnings_in(caplog)) == (rate == 0.2)

    def test_keep_the_type_that_the_optimizer_gave_them(self, tmp_path):
        class Precise(torch.optim.SGD):
            def step(self):
                for parameter in self.param_groups[0]["params"]:
                    self.state[parameter].setdefault("sum", torch.zeros_like(parameter, dtype=torch.float64))
                    self.state[parameter]["sum"] += 1 / 3

        def build():
            model = nn.Linear(3, 1)
            return {"model": model, "optimizer": Precise(model.parameters(), lr=0.1)}

        first, second = build(), build()
        train(first, tmp_path, 2)
        train(second, tmp_path, 2)

        for one, other in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
            kept, restored = first["optimizer"].state[one]["sum"], second["optimizer"].state[other]["sum"]
            assert restored.dtype == torch.float64
            assert torch.equal(kept, restored)


class TestAGroupThatWasAddedOnTheWay:
    def build(self):
        torch.manual_seed(SEED)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        model[0].requires_grad_(False)
        return {"model": model, "optimizer": torch.optim.AdamW(model[1].parameters(), lr=0.01)}

    def train(self, state, logdir, until):
        model, optimizer = state["model"], state["optimizer"]
        sv = Supervisor(state, logdir, save_model_secs=0, save_model_steps=until)
        with sv.managed_session() as session:
            for _ in session.steps(max_steps=until):
                if session.global_step >= 2 and not model[0].weight.requires_grad:
                    model[0].requires_grad_(True)
                    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.001})
                generator = torch.Generator().manual_seed(session.global_step)
                step(model, optimizer, torch.randn(4, 3, generator=generator))

    def test_is_there_again_after_a_restart_and_the_layers_train(self, tmp_path):
        whole = self.build()
        self.train(whole, tmp_path / "whole", 8)
        self.train(self.build(), tmp_path / "parts", 5)
        again = self.build()
        self.train(again, tmp_path / "parts", 8)

        assert len(again["optimizer"].param_groups) == 2
        assert again["optimizer"].param_groups[1]["lr"] == 0.001
        for one, other in zip(whole["model"].parameters(), again["model"].parameters(), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("place", ["body", "between"])
    def test_may_be_added_again_where_the_program_comes_to_its_place_again(self, place, tmp_path):
        def train(logdir, until):
            state = self.build()
            model, optimizer = state["model"], state["optimizer"]
            added = {"params": model[0].parameters(), "lr": 0.001}
            sv = Supervisor(state, logdir, save_model_secs=0, save_model_steps=until)
            with sv.managed_session() as session:
                if place == "between":
                    for _ in session.steps(max_steps=3):
                        step(model, optimizer, torch.randn(4, 3))
                    model[0].requires_grad_(True)
                    optimizer.add_param_group(added)
                for epoch in session.epochs(3):
                    if place == "body" and epoch == 1:
                        model[0].requires_grad_(True)
                        optimizer.add_param_group(added)
                    for _ in session.steps([1, 2, 3], max_steps=until):
                        if "lr" in added and session.global_step == 6:
                            added["lr"] *= 0.5
                        step(model, optimizer, torch.randn(4, 3))
            return state

        whole = train(tmp_path / "whole", 9)
        train(tmp_path / "parts", 5)
        again = train(tmp_path / "parts", 9)

        assert [group["lr"] for group in again["optimizer"].param_groups] == [0.01, 0.0005]
        for one, other in zip(whole["model"].parameters(), again["model"].parameters(), strict=True):
            assert torch.equal(one, other)

    def test_is_refused_with_what_to_do_if_it_is_another_one_now(self, tmp_path):
        self.train(self.build(), tmp_path, 5)
        state = self.build()
        with (
            Supervisor(state, tmp_path).managed_session(),
            pytest.raises(ValueError, match=r"newest\(logdir\)\.groups"),
        ):
            state["optimizer"].add_param_group({"params": state["model"][0].weight})

    @pytest.mark.parametrize("counts", [(2, 1), (1, 2), (3, 2)])
    def test_is_named_in_the_error_if_the_program_builds_another_number_of_groups(self, counts, tmp_path):
        def build(count):
            model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
            layers = [*model.children()]
            groups = [*([one] for one in layers[: count - 1]), layers[count - 1 :]]
            parameters = [{"params": [each for one in group for each in one.parameters()]} for group in groups]
            return {"model": model, "optimizer": torch.optim.SGD(parameters, lr=0.01, momentum=0.9)}

        before, now = counts
        train(build(before), tmp_path, 3)
        with pytest.raises(CheckpointMismatchError, match=r"newest\(logdir\)\.groups") as caught:
            train(build(now), tmp_path, 3)

        assert caught.value.reshaped["optimizer.param_groups"][0] == f"{now} groups"

    def test_is_shown_to_a_program_that_builds_itself_accordingly(self, tmp_path):
        assert newest(tmp_path) is None
        self.train(self.build(), tmp_path, 1)
        before = newest(tmp_path)
        self.train(self.build(), tmp_path, 5)
        found = newest(tmp_path)

        assert before.step == 1
        assert set(before.frozen) == {"model.0.weight", "model.0.bias"}
        assert found.step == 5
        assert set(found.parts) == {"model", "optimizer"}
        assert found.frozen == ()
        assert found.groups == {"optimizer": [["model.1.weight", "model.1.bias"], ["model.0.weight", "model.0.bias"]]}
        assert Supervisor(self.build(), tmp_path).newest_step() == 5


class TestNames:
    @pytest.mark.parametrize("wrapped_first", [True, False])
    def test_are_the_same_with_and_without_a_compiled_layer(self, tmp_path, wrapped_first):
        def build(is_compiled):
            model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
            if is_compiled:
                model[1] = torch.compile(model[1], backend="eager")
            return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}

        first, second = build(wrapped_first), build(not wrapped_first)
        with torch.no_grad():
            first["model"][1].running_mean += 3
        for parameter in first["model"].parameters():
            parameter.grad = torch.ones_like(parameter)
        first["optimizer"].step()
        sv = Supervisor(first, tmp_path)
        with sv.managed_session() as session:
            for _ in session.steps(max_steps=2):
                pass
        with Supervisor(second, tmp_path).managed_session():
            pass

        for one, other in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
            assert torch.equal(one, other)
            kept, restored = first["optimizer"].state[one], second["optimizer"].state[other]
            assert torch.equal(kept["exp_avg"], restored["exp_avg"])
        assert second["model"][1].running_mean.tolist() == [3, 3, 3]
        saved = torch.load(tmp_path / "model.ckpt-2" / "model.pt", weights_only=True)
        assert not [name for name in saved if "_orig_mod" in name]

    def test_are_the_same_with_and_without_data_parallel_inside(self, tmp_path):
        def build(wrap):
            torch.manual_seed(SEED)
            return {"model": nn.ModuleDict({"encoder": wrap(nn.Linear(3, 3)), "head": nn.Linear(3, 1)})}

        first, second = build(nn.DataParallel), build(lambda one: one)
        train(first, tmp_path, 1)
        with torch.no_grad():
            second["model"]["encoder"].weight.zero_()
        train(second, tmp_path, 1)

        assert torch.equal(first["model"]["encoder"].module.weight, second["model"]["encoder"].weight)


class History(nn.Linear):
    """Keeps an extra state that grows."""

    def __init__(self):
        super().__init__(3, 1)
        self.seen: list[float] = []

    def forward(self, x):
        self.seen.append(float(x.abs().max()))
        return super().forward(x)

    def get_extra_state(self):
        return torch.frombuffer(bytearray(pickle.dumps(self.seen)), dtype=torch.uint8)

    def set_extra_state(self, state):
        self.seen = pickle.loads(state.numpy().tobytes())


class Observer(nn.Module):
    """Makes room for what is loaded, as observers of quantisation do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.tensor([]))

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        self.seen.resize_(state_dict[prefix + "seen"].shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class TestWhatAModuleLoadsInItsOwnWay:
    def test_an_extra_state_of_any_length_is_given_back(self, tmp_path):
        def build():
            model = History()
            return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

        first, second = build(), build()
        train(first, tmp_path, 3)
        train(second, tmp_path, 5)

        assert second["model"].seen[:3] == first["model"].seen
        assert len(second["model"].seen) == 5

    def test_a_buffer_that_it_makes_room_for_is_no_mismatch(self, tmp_path):
        first = {"model": nn.Sequential(nn.Linear(3, 1), Observer())}
        first["model"][1].seen = torch.arange(4.0)
        train(first, tmp_path, 1)
        second = {"model": nn.Sequential(nn.Linear(3, 1), Observer())}
        train(second, tmp_path, 1)

        assert second["model"][1].seen.tolist() == [0, 1, 2, 3]

    def test_a_shape_that_nobody_adapts_is_still_one(self, tmp_path):
        train({"model": nn.Sequential(nn.Linear(3, 1), Observer())}, tmp_path, 1)
        other = nn.Sequential(nn.Linear(3, 2), Observer())
        before = other[0].weight.clone()
        with pytest.raises(CheckpointMismatchError, match=r"model\.0\.weight"):
            train({"model": other}, tmp_path, 1)
        assert torch.equal(before, other[0].weight)


class TestAnEmptyState:
    @pytest.mark.parametrize("is_enabled", [True, False])
    def test_against_a_filled_one_is_found_before_anything_is_loaded(self, tmp_path, is_enabled):
        train({"model": nn.Linear(3, 1), "scaler": torch.amp.GradScaler("cpu", enabled=is_enabled)}, tmp_path, 1)
        model = nn.Linear(3, 1)
        before = model.weight.clone()
        with pytest.raises(CheckpointMismatchError) as caught:
            train({"model": model, "scaler": torch.amp.GradScaler("cpu", enabled=not is_enabled)}, tmp_path, 1)

        assert set(caught.value.reshaped) == {"scaler"}
        assert torch.equal(before, model.weight)

    def test_nothing_in_the_place_of_an_object_is_to_be_left_out(self, tmp_path):
        with pytest.raises(TypeError, match="leave 'scaler' out"):
            Supervisor({"model": nn.Linear(1, 1), "scaler": None}, tmp_path)


def build_sgd(**options):
    torch.manual_seed(SEED)
    model = nn.Linear(3, 1)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), **options)}


class TestAnotherHyperparameter:
    @pytest.mark.parametrize(
        ("before", "now", "name"),
        [
            ({"lr": 0.1}, {"lr": 0.01}, "lr"),
            ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.5}, "momentum"),
            ({"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.1, "weight_decay": 0.5}, "weight_decay"),
            ({"lr": 0.1}, {"lr": 0.1, "foreach": True}, "foreach"),
            ({"lr": 0.1, "fused": True}, {"lr": 0.1}, "fused"),
        ],
    )
    def test_is_told_with_both_values_and_the_checkpoint_wins(self, tmp_path, caplog, before, now, name):
        train(build_sgd(**before), tmp_path, 2)
        assert warnings_in(caplog) == ""
        for _ in range(2):  # At each start, for as long as the two differ.
            caplog.clear()
            state = build_sgd(**now)
            train(state, tmp_path, 3)

            assert state["optimizer"].param_groups[0][name] == before.get(name)
            said = warnings_in(caplog)
            assert f"optimizer.param_groups[0].{name}" in said
            assert f"({now.get(name)} in the program, {before.get(name)} in the checkpoint)" in said
            assert "hyperparameters='program'" in said

    def test_is_taken_from_the_program_if_that_is_asked_for(self, tmp_path, caplog):
        train(build_sgd(lr=0.1, momentum=0.9), tmp_path, 2)
        state = build_sgd(lr=0.01, momentum=0.5)
        options = Restoring(hyperparameters="program")
        train(state, tmp_path, 3, restoring=options)

        assert state["optimizer"].param_groups[0]["lr"] == 0.01
        assert state["optimizer"].param_groups[0]["momentum"] == 0.5
        assert "those of the program are used" in warnings_in(caplog)
        caplog.clear()
        train(build_sgd(lr=0.01, momentum=0.5), tmp_path, 4)
        assert warnings_in(caplog) == ""  # These are those of the run by now.

    @pytest.mark.parametrize(
        ("kind", "option"),
        [
            (torch.optim.AdamW, {"amsgrad": True}),
            (torch.optim.RMSprop, {"centered": True}),
            (torch.optim.RMSprop, {"momentum": 0.9}),
        ],
    )
    def test_that_needs_sums_which_the_run_has_not_kept_begins_them(self, kind, option, tmp_path):
        def build(**options):
            model = nn.Linear(3, 1)
            return {"model": model, "optimizer": kind(model.parameters(), lr=0.1, **options)}

        train(build(), tmp_path, 2)
        state = build(**option)
        train(state, tmp_path, 3, restoring=Restoring(hyperparameters="program"))
        assert state["optimizer"].param_groups[0].items() >= option.items()
        assert all(part.isfinite().all() for one in state["optimizer"].state.values() for part in one.values())

    def test_is_nothing_that_a_schedule_or_the_program_has_moved_meanwhile(self, tmp_path, caplog):
        def build():
            state = build_sgd(lr=0.1)
            state["scheduler"] = schedulers.StepLR(state["optimizer"], step_size=1, gamma=0.5)
            return state

        train(build(), tmp_path, 3)
        again = build()
        train(again, tmp_path, 4)

        assert warnings_in(caplog) == ""
        assert again["optimizer"].param_groups[0]["lr"] == pytest.approx(0.00625)

    def test_that_a_schedule_has_moved_keeps_its_factor_with_the_program_s_value(self, tmp_path):
        def build(lr):
            state = build_sgd(lr=lr)
            state["scheduler"] = schedulers.StepLR(state["optimizer"], step_size=1, gamma=0.5)
            return state

        train(build(0.1), tmp_path, 2)
        state = build(0.4)
        train(state, tmp_path, 3, restoring=Restoring(hyperparameters="program"))
        assert state["optimizer"].param_groups[0]["lr"] == pytest.approx(0.4 * 0.125)

    @pytest.mark.parametrize(
        ("make", "place"),
        [
            (schedulers.CosineAnnealingLR, "T_max"),
            (lambda optimizer, steps: schedulers.LinearLR(optimizer, total_iters=steps), "total_iters"),
            (lambda optimizer, steps: schedulers.MultiStepLR(optimizer, [steps // 2, steps]), "milestones"),
            (lambda optimizer, steps: schedulers.OneCycleLR(optimizer, 0.1, total_steps=steps), "total_steps"),
            (lambda optimizer, steps: schedulers.LambdaLR(optimizer, lambda at: 1 - at / steps), "lr_lambdas"),
            (lambda optimizer, steps: schedulers.LambdaLR(optimizer, lambda at, of=steps: 1 - at / of), "[0].of"),
            (lambda optimizer, steps: schedulers.LambdaLR(optimizer, Decay(steps).factor), "[0].steps"),
            (lambda optimizer, steps: schedulers.LambdaLR(optimizer, decay_of(Decay(steps))), "[0].args.steps"),
            (lambda optimizer, steps: schedulers.LambdaLR(optimizer, decay_of({"steps": steps})), "[0].args.steps"),
            (lambda optimizer, steps: schedulers.LambdaLR(optimizer, decay_by_global(steps)), "[0].STEPS"),
            (
                lambda optimizer, steps: schedulers.SequentialLR(
                    optimizer,
                    [schedulers.ConstantLR(optimizer), schedulers.CosineAnnealingLR(optimizer, steps)],
                    milestones=[1],
                ),
                "T_max",
            ),
        ],
    )
    def test_such_as_the_length_of_a_schedule_is_named(self, tmp_path, caplog, make, place):
        def build(steps):
            state = build_sgd(lr=0.1)
            state["scheduler"] = make(state["optimizer"], steps)
            return state

        train(build(6), tmp_path, 2)
        assert warnings_in(caplog) == ""
        train(build(12), tmp_path, 8)
        said = warnings_in(caplog)
        assert "scheduler." in said
        assert place in said

    def test_such_as_another_kind_of_schedule_is_refused(self, tmp_path):
        def build(kind):
            state = build_sgd(lr=0.1)
            state["scheduler"] = kind(state["optimizer"], 5)
            return state

        train(build(schedulers.StepLR), tmp_path, 2)
        with pytest.raises(CheckpointMismatchError, match="state of a CosineAnnealingLR"):
            train(build(schedulers.CosineAnnealingLR), tmp_path, 3)

    def test_such_as_another_optimizer_of_the_same_form_is_told(self, tmp_path, caplog):
        def build(kind):
            torch.manual_seed(SEED)
            model = nn.Linear(3, 1)
            return {"model": model, "optimizer": kind(model.parameters(), lr=0.1, weight_decay=0.5)}

        train(build(torch.optim.Adam), tmp_path, 2)
        train(build(torch.optim.AdamW), tmp_path, 3)
        assert "optimizer.class of AdamW (AdamW in the program, Adam in the checkpoint)" in warnings_in(caplog)


class TestACast:
    def test_is_told(self, tmp_path, caplog):
        train({"model": nn.Linear(3, 1)}, tmp_path, 1)
        train({"model": nn.Linear(3, 1).to(torch.bfloat16)}, tmp_path, 1)
        said = warnings_in(caplog)
        assert "model.weight (torch.float32 in the checkpoint, torch.bfloat16 in the program)" in said


class TestParametersThatNobodySaves:
    def test_are_named_when_the_supervisor_is_made(self, tmp_path, caplog):
        model, stranger = nn.Linear(3, 1), nn.Linear(2, 2, bias=False)
        optimizer = torch.optim.SGD([*model.parameters(), *stranger.parameters()], lr=0.1)
        Supervisor({"model": model, "optimizer": optimizer}, tmp_path)
        assert "param_groups[0].2 [2, 2]" in warnings_in(caplog)

    def test_are_none_when_an_object_of_another_kind_holds_them(self, tmp_path, caplog):
        weight = torch.ones(3, requires_grad=True)
        held = Values(weight=weight)
        Supervisor({"held": held, "optimizer": torch.optim.SGD([weight], lr=0.1)}, tmp_path)
        assert warnings_in(caplog) == ""


class TestAPart:
    def test_that_was_added_begins_as_the_program_made_it_and_is_named(self, tmp_path, caplog):
        train(build_sgd(lr=0.1), tmp_path, 2)
        state = {**build_sgd(lr=0.1), "ema": nn.Linear(3, 1)}
        before = state["ema"].weight.clone()
        train(state, tmp_path, 3)

        assert torch.equal(before, state["ema"].weight)
        assert "as the program has made them begin ema" in warnings_in(caplog)

    def test_that_was_dropped_is_named(self, tmp_path, caplog):
        train(build_sgd(lr=0.1), tmp_path, 2)
        train({"model": nn.Linear(3, 1)}, tmp_path, 3)
        assert "not taken from the checkpoint are optimizer" in warnings_in(caplog)

    def test_that_may_have_been_renamed_is_refused(self, tmp_path):
        train({"model": nn.Linear(3, 1), "values": Values(best=1)}, tmp_path, 1)
        with pytest.raises(CheckpointMismatchError) as caught:
            train({"network": nn.Linear(3, 1), "values": Values(best=1)}, tmp_path, 2)
        assert caught.value.missing == ("network",)
        assert caught.value.unexpected == ("model",)

    def test_alone_is_restored_if_that_is_asked_for(self, tmp_path, caplog):
        first = build_sgd(lr=0.1, momentum=0.9)
        train(first, tmp_path, 2)
        model = nn.Linear(3, 1)
        state = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}
        train(state, tmp_path, 2, restoring=Restoring(only=("model",)))

        assert torch.equal(first["model"].weight, model.weight)
        assert not state["optimizer"].state
        said = warnings_in(caplog)
        assert "restored are model" in said
        assert "optimizer" in said

    def test_that_is_asked_for_and_not_there_is_refused(self, tmp_path):
        train({"model": nn.Linear(3, 1)}, tmp_path, 1)
        with pytest.raises(CheckpointMismatchError, match="ema"):
            train({"model": nn.Linear(3, 1), "ema": nn.Linear(3, 1)}, tmp_path, 2, restoring=Restoring(only=["ema"]))


class TestKeysThatAreLeftOut:
    def build(self, outputs):
        torch.manual_seed(SEED)
        model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, outputs)})
        model.forward = lambda x: model["head"](model["body"](x))
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}

    def test_begin_as_the_program_made_them_with_moments_of_their_own(self, tmp_path, caplog):
        first = self.build(1)
        train(first, tmp_path, 2)
        state = self.build(5)
        before = state["model"]["head"].weight.clone()
        train(state, tmp_path, 2, restoring=Restoring(leave_out=["model.head.*"]))

        assert torch.equal(first["model"]["body"].weight, state["model"]["body"].weight)
        assert torch.equal(before, state["model"]["head"].weight)
        kept = moments(state["model"], state["optimizer"])
        assert kept.keys() == {"body.weight", "body.bias"}
        assert torch.equal(kept["body.weight"], moments(first["model"], first["optimizer"])["body.weight"])
        assert "model.head.weight" in warnings_in(caplog)

    @pytest.mark.parametrize("option", ["leave_out", "only"])
    def test_of_unknown_names_are_told_of(self, option, tmp_path, caplog):
        known, unknown = ("model.head.*", "head.*") if option == "leave_out" else ("model", "modle")
        train(self.build(1), tmp_path, 1)
        train(self.build(1), tmp_path, 1, restoring=Restoring(**{option: [known]}))
        assert f"Restoring({option}=...)" not in warnings_in(caplog)
        train(self.build(1), tmp_path, 1, restoring=Restoring(**{option: [known, unknown]}))
        assert f"found {unknown!r}, which match nothing" in warnings_in(caplog)

    def test_and_others_of_another_shape_are_refused(self, tmp_path):
        train(self.build(1), tmp_path, 2)
        with pytest.raises(CheckpointMismatchError, match=r"model\.head\.weight"):
            train(self.build(5), tmp_path, 3, restoring=Restoring(leave_out=["model.body.*"]))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"only": "model"}, TypeError),
        ({"leave_out": [3]}, TypeError),
        ({"hyperparameters": "mine"}, ValueError),
        ({"init_from": 3}, TypeError),
        ({"init_fit": "some"}, ValueError),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Restoring(**options)


class Centred(torch.nn.Module):
    """Makes its buffer of the first batch."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 1)
        self.register_buffer("mean", None)

    def forward(self, x):
        mean = x.mean(0)
        self.mean = mean if self.mean is None else (self.mean + mean) / 2
        return self.inner(x - self.mean)


def test_a_buffer_that_the_first_batch_makes_is_restored(tmp_path):
    for end in (1, 2):
        model = torch.nn.Sequential(Centred())
        saving = Saving(save_model_secs=0, save_at_end=True)
        with Supervisor({"model": model}, tmp_path, saving=saving, save_summaries_secs=0).managed_session() as sess:
            if end == 2:
                assert model[0].mean.tolist() == [1, 1]
            for step in sess.steps(max_steps=end):
                model(torch.full((1, 2), 1.0 + 2 * step))
    assert model[0].mean.tolist() == [2, 2]


def test_a_buffer_that_only_the_checkpoint_has_is_refused(tmp_path):
    train({"model": nn.BatchNorm1d(3)}, tmp_path, 1)
    with pytest.raises(CheckpointMismatchError, match=r"model\.running_mean"):
        train({"model": nn.BatchNorm1d(3, track_running_stats=False)}, tmp_path, 2)


def test_a_module_of_inference_mode_is_restored(tmp_path):
    for _ in range(2):
        with torch.inference_mode():
            averaged = torch.nn.Linear(1, 1)
        saving = Saving(save_model_secs=0, save_at_end=True)
        state = {"averaged": averaged}
        with Supervisor(state, tmp_path, saving=saving, save_summaries_secs=0).managed_session() as sess:
            if sess.global_step:
                assert averaged.weight.item() == 3
            for _ in sess.steps(max_steps=1):
                with torch.inference_mode():
                    averaged.weight.fill_(3)
