"""What decides the next step and is in no state_dict: it is put back, or a warning names it."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stepguard.options import Saving
from stepguard.torch import Supervisor, Values

X = torch.linspace(-1, 1, 32)[:, None]


def session(state, logdir):
    saving = Saving(save_model_secs=0, save_at_end=True)
    return Supervisor(state, logdir, saving=saving, save_summaries_secs=0).managed_session()


def loader():
    return DataLoader(TensorDataset(X), batch_size=4)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


class Tempered(torch.nn.Module):
    def __init__(self, temperature=1.0):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
        self.temperature = temperature
        self.hidden = None
        self.register_buffer("mean", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.inner(x) / self.temperature


class TestAttributesOfModules:
    def test_that_the_run_has_changed_are_named(self, tmp_path, caplog):
        model = Tempered()
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                model.temperature *= 0.5
                model.inner[1].eval()
                model.inner[2].p = 0.1
        again = Tempered()
        with session({"model": again}, tmp_path):
            assert again.temperature == 1.0
        assert "model.temperature (0.25 there, 1.0 here)" in caplog.text
        assert "model.inner.2.p (0.1 there, 0.5 here)" in caplog.text
        assert "model.inner.1.training (False there, True here)" in caplog.text

    def test_that_the_program_makes_as_they_were_are_not(self, tmp_path, caplog):
        model = Tempered()
        model.best = float("nan")
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                model.temperature *= 0.5
        again = Tempered(temperature=0.25)
        again.best = float("nan")
        with session({"model": again}, tmp_path):
            pass
        assert not caplog.text

    def test_that_belong_together_are_left_as_they_are(self, tmp_path):
        """A flag that says what another attribute holds, as of a cache that is made when it is needed."""

        class Cached(torch.nn.Linear):
            length, cache = None, None

            def forward(self, x):
                if self.length != len(x):
                    self.length, self.cache = len(x), torch.ones(len(x), 1)
                return super().forward(x * self.cache)

        for steps in (2, 4):
            model = Cached(1, 1)
            with torch.inference_mode():
                model.kept = torch.ones(1)
            with session({"model": model}, tmp_path) as sess:
                for (x,) in sess.steps(loader(), max_steps=steps):
                    model(x)

    def test_that_are_tensors_are_named(self, tmp_path, caplog):
        model = Tempered()
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                model.hidden = torch.ones(2)
                model.mean.add_(1)
        with session({"model": Tempered()}, tmp_path):
            pass
        assert "no state_dict has, and it begins as the program makes it: model.hidden, model.mean." in caplog.text

    def test_that_are_results_of_a_step_are_not(self, tmp_path, caplog):
        model = Tempered()
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                model.hidden = model(X)
        with session({"model": Tempered()}, tmp_path):
            pass
        assert not caplog.text


class Changing(torch.nn.Linear):
    """Changes one of its attributes in each step."""

    def __init__(self, change):
        super().__init__(1, 1)
        self._rate, self.pair, self.numbers, self.array = 1.0, (1.0, "a"), [1.0], np.ones(1)
        self.number, self._kept, self._latest, self.cache = np.float32(1), None, None, None
        self.change = change

    def forward(self, x):
        self.change(self)
        return super().forward(x * self._rate)

    def halve(self):
        self._rate *= 0.5

    def keep(self):
        self._kept = torch.ones(1) if self._kept is None else self._kept + 1


def scale(module):
    module.array *= 0.5


def halve_first(module):
    module.numbers[0] *= 0.5


def make_cache(module):
    if module.cache is None:
        module.cache = torch.arange(4.0)


class TestAttributesOfOtherKinds:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (Changing.halve, "model._rate (0.25 there, 1.0 here)"),
            (Changing.keep, "program makes it: model._kept."),
            (halve_first, "model.numbers ([0.25] there, [1.0] here)"),
            (scale, "model.array ([0.25] there, [1.0] here)"),
            (lambda module: setattr(module, "number", module.number / 2), "model.number (0.25 there, 1.0 here)"),
        ],
    )
    def test_are_named(self, change, said, tmp_path, caplog):
        for _ in range(2):
            model = Changing(change)
            with session({"model": model}, tmp_path) as sess:
                for _ in sess.steps(max_steps=2):
                    model(X)
        assert said in caplog.text

    @pytest.mark.parametrize(
        "change",
        [
            lambda module: setattr(module, "_latest", torch.rand(2)),
            lambda module: setattr(module, "pair", (random.random(), "b")),
            lambda module: setattr(module, "numbers", [random.random()]),
            lambda module: setattr(module, "array", np.random.rand(2)),
        ],
    )
    def test_that_each_step_puts_anew_are_not_named(self, change, tmp_path, caplog):
        for _ in range(2):
            model = Changing(change)
            with session({"model": model}, tmp_path) as sess:
                for _ in sess.steps(max_steps=sess.global_step + 2):
                    model(X)
        assert "no state_dict has" not in caplog.text

    def test_of_pytorch_itself_are_not(self, tmp_path, caplog):
        for end in (2, 4):
            model = torch.nn.Linear(1, 1)
            optimizer = adam(model)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            with session({"model": model, "optimizer": optimizer, "schedule": schedule}, tmp_path) as sess:
                for _ in sess.steps(max_steps=end):
                    train(model, optimizer, X)
                    schedule.step()
                    model._of_its_own = sess.global_step
        assert not caplog.text

    @pytest.mark.parametrize("wait", [0, 1])
    def test_that_the_loop_sets_again_are_not(self, wait, tmp_path, caplog):
        for end in (3, 6):
            model = Tempered()
            with session({"model": model}, tmp_path) as sess:
                for step in sess.steps(max_steps=end):
                    model.inner[1].eval()
                    model.temperature = 0.25
                    model(X)
                    assert step < 3 + wait or not caplog.text
        assert not caplog.text

    @pytest.mark.parametrize("end", [2, 3])
    def test_that_turn_over_in_each_step_are_named(self, end, tmp_path, caplog):
        for more in (0, 2):
            model = Tempered()
            model.is_odd = False
            with session({"model": model}, tmp_path) as sess:
                for _ in sess.steps(max_steps=end + more):
                    model.is_odd = not model.is_odd
        assert ("model.is_odd" in caplog.text) == (end == 3)

    def test_that_are_made_once_are_not(self, tmp_path, caplog):
        for end in (2, 5):
            model = Changing(make_cache)
            with session({"model": model}, tmp_path) as sess:
                for _ in sess.steps(max_steps=end):
                    model(X)
        assert not caplog.text

    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
    def test_that_each_step_computes_are_not_after_an_evaluation(self, tmp_path, caplog):
        for end in (2, 5):
            model = torch.nn.utils.weight_norm(torch.nn.Linear(1, 1))
            with session({"model": model}, tmp_path) as sess:
                for _ in sess.steps(max_steps=end):
                    model(X).sum().backward()
                    with torch.no_grad():
                        model(X)
                    if end == 5:
                        model(X)
        assert not caplog.text

    @pytest.mark.parametrize(
        ("make", "draw"),
        [
            (lambda: torch.Generator().manual_seed(1), lambda one: torch.rand((), generator=one).item()),
            (lambda: random.Random(1), lambda one: one.random()),
            (lambda: np.random.default_rng(1), lambda one: one.random()),
        ],
    )
    def test_that_are_generators_go_on(self, make, draw, tmp_path, caplog):
        generator, drawn = make(), []
        expected = [draw(generator) for _ in range(4)]
        for end in (2, 4):
            model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(1, 1)), torch.nn.ReLU())
            model[0][0].noise = model[1].noise = make()
            with session({"model": model}, tmp_path) as sess:
                drawn += [draw(model[0][0].noise) for _ in sess.steps(max_steps=end)]
        assert drawn == expected
        assert not caplog.text


def test_a_generator_of_the_system_or_of_another_kind_ends_no_run(tmp_path, caplog):
    for make in (lambda: random.Random(1), lambda: torch.Generator().manual_seed(1)):
        model = torch.nn.Linear(1, 1)
        model.noise, model.secret = make(), random.SystemRandom()
        with session({"model": model}, tmp_path) as sess:
            for _ in sess.steps(max_steps=1):
                model.noise.random()
    assert "model.noise: the generator begins as the program makes it" in caplog.text


def test_a_rate_that_the_program_sets_from_one_of_its_own_is_no_schedule(tmp_path, caplog):
    model = torch.nn.Linear(1, 1)
    optimizer = adam(model)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    with session({"model": model, "optimizer": optimizer}, tmp_path) as sess:
        for _ in sess.steps(max_steps=3):
            train(model, optimizer, X)
    assert not caplog.text


class TestWhatTrainsAndIsNotInTheState:
    def run(self, tmp_path, make, *, names=()):
        torch.manual_seed(1)
        model = torch.nn.Linear(1, 1)
        optimizer = adam(model)
        step, others = make(model, optimizer)
        state = {"model": model, "optimizer": optimizer, **{name: others[name] for name in names}}
        with session(state, tmp_path) as sess:
            for (x,) in sess.steps(loader(), max_steps=4):
                step(x)

    def second(self, model, optimizer):
        other = adam(model)

        def step(x):
            train(model, optimizer, x)
            train(model, other, x)

        return step, {"other": other}

    def schedule(self, model, optimizer):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)

        def step(x):
            train(model, optimizer, x)
            schedule.step()

        return step, {"other": schedule}

    def scaler(self, model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def step(x):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        return step, {"other": scaler}

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ("second", "an optimizer (Adam) trains in the steps, and it is not in the state"),
            ("schedule", "optimizer has a learning rate scheduler, and that is not in the state"),
            ("scaler", "optimizer is stepped by a GradScaler, and that is not in the state"),
        ],
    )
    def test_is_named_once(self, kind, said, tmp_path, caplog):
        self.run(tmp_path / "without", getattr(self, kind))
        assert caplog.text.count(said) == 1
        caplog.clear()
        self.run(tmp_path / "with", getattr(self, kind), names=["other"])
        assert not caplog.text

    def test_may_be_an_optimizer_for_one_step(self, tmp_path, caplog):
        def inner(model, optimizer):
            def step(x):
                train(model, optimizer, x)
                fast = torch.nn.Linear(1, 1)
                train(fast, adam(fast), x)

            return step, {}

        self.run(tmp_path, inner)
        assert not caplog.text


MODULE_RANDOM = random.Random(3)


def cycle(data):
    while True:
        yield from data


class Batches:
    """A program that takes its batches itself, in several ways."""

    def __init__(self, logdir, end):
        self.model = Tempered()
        self.optimizer = adam(self.model)
        self.data = loader()
        self.logdir, self.end = logdir, end

    def session(self):
        return session({"model": self.model, "optimizer": self.optimizer}, self.logdir)

    def train(self, batches, sess):
        for _ in sess.steps(max_steps=self.end):
            train(self.model, self.optimizer, *next(batches))

    def from_an_iterator(self):
        batches = iter(self.data)
        with self.session() as sess:
            self.train(batches, sess)

    def from_an_iterator_that_has_given_one(self):
        batches = iter(self.data)
        next(batches)
        with self.session() as sess:
            self.train(batches, sess)

    def from_a_generator(self):
        batches = cycle(self.data)
        with self.session() as sess:
            self.train(batches, sess)

    def from_two(self):
        batches = ((one,) for (one,), _ in zip(self.data, loader(), strict=True))
        with self.session() as sess:
            self.train(batches, sess)

    def in_a_loop_of_its_own(self):
        with self.session() as sess:
            for (x,) in self.data:
                with sess.step():
                    train(self.model, self.optimizer, x)
                if sess.global_step == self.end:
                    break

    def in_a_loop_that_skips_what_was_seen(self):
        with self.session() as sess:
            first = sess.global_step
            for number, (x,) in enumerate(self.data):
                if number < first:
                    continue
                with sess.step():
                    train(self.model, self.optimizer, x)
                if sess.global_step == self.end:
                    break

    def with_a_look_at_the_evaluation_first(self):
        looked_at = iter(loader())
        with self.session() as sess:
            kept = iter(loader())
            assert next(looked_at) is not next(kept)
            for (x,) in sess.steps(self.data, max_steps=self.end):
                train(self.model, self.optimizer, x)

    def from_steps(self):
        with self.session() as sess:
            for (x,) in sess.steps(self.data, max_steps=self.end):
                train(self.model, self.optimizer, x)

    def from_steps_over_a_generator(self):
        with self.session() as sess:
            for (x,) in sess.steps(cycle(self.data), max_steps=self.end):
                train(self.model, self.optimizer, x)

    def from_steps_over_a_function(self):
        with self.session() as sess:
            for (x,) in sess.steps(lambda: iter(self.data), max_steps=self.end):
                train(self.model, self.optimizer, x)

    def from_steps_through_a_wrapper(self):
        with self.session() as sess:
            for (x,) in (batch for batch in sess.steps(self.data, max_steps=self.end)):
                train(self.model, self.optimizer, x)

    def from_steps_with_an_evaluation_in_each(self):
        with self.session() as sess:
            for (x,) in sess.steps(self.data, max_steps=self.end):
                train(self.model, self.optimizer, x)
                evaluation = loader()
                for batch in evaluation:
                    assert len(batch[0]) == 4
                assert next(iter(evaluation)) is not None

    def from_an_iterator_that_is_put_to_its_place(self):
        batches = iter(self.data)
        with self.session() as sess:
            for _ in range(sess.global_step):
                next(batches)
            self.train(batches, sess)


class TestIteratorsOfTheProgram:
    @pytest.mark.parametrize(
        ("way", "ahead"),
        [
            (Batches.from_an_iterator, 0),
            (Batches.from_an_iterator_that_has_given_one, 1),
            (Batches.from_a_generator, 0),
            (Batches.from_two, 0),
            (Batches.in_a_loop_of_its_own, 0),
        ],
    )
    @pytest.mark.parametrize("steps", [1, 3])
    def test_that_give_the_steps_their_batches_are_named_at_the_restart(self, way, ahead, steps, tmp_path, caplog):
        way(Batches(tmp_path, steps))
        assert "iterators of the program" not in caplog.text
        way(Batches(tmp_path, steps + 2))
        named = f"are not those of the interrupted run: TensorDataset (after {steps + ahead} batches)"
        assert named in caplog.text

    def test_that_have_come_to_their_end_are_named_too(self, tmp_path, caplog):
        batches = len(loader())
        Batches(tmp_path, batches).in_a_loop_of_its_own()
        Batches(tmp_path, batches + 1).in_a_loop_of_its_own()
        assert f"are not those of the interrupted run: TensorDataset (after {batches} batches)" in caplog.text

    def test_that_give_the_steps_their_batches_are_named_at_each_restart(self, tmp_path, caplog):
        for end in (1, 2, 3):
            caplog.clear()
            Batches(tmp_path, end).in_a_loop_of_its_own()
            assert ("iterators of the program" in caplog.text) == (end > 1)

    @pytest.mark.parametrize(
        "way",
        [
            Batches.from_steps,
            Batches.from_steps_over_a_generator,
            Batches.from_steps_over_a_function,
            Batches.from_steps_through_a_wrapper,
            Batches.from_steps_with_an_evaluation_in_each,
            Batches.from_an_iterator_that_is_put_to_its_place,
            Batches.in_a_loop_that_skips_what_was_seen,
            Batches.with_a_look_at_the_evaluation_first,
        ],
    )
    @pytest.mark.parametrize("steps", [2, 3])
    def test_that_are_at_their_place_are_not(self, way, steps, tmp_path, caplog):
        for end in (steps, steps + 2):
            way(Batches(tmp_path, end))
        assert "iterators of the program" not in caplog.text


class TestGeneratorsOfTheProgram:
    @pytest.mark.parametrize("kind", [np.random.default_rng, random.Random, lambda _: torch.Generator().manual_seed(1)])
    def test_that_the_steps_draw_from_are_named_at_the_restart(self, kind, tmp_path, caplog):
        for _ in range(2):
            source = kind(1)
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                assert not sess.global_step or "they begin anew: source." in caplog.text
                for _ in sess.steps(max_steps=sess.global_step + 2):
                    torch.rand((), generator=source) if isinstance(source, torch.Generator) else source.random()

    def test_may_be_of_the_module(self, tmp_path, caplog):
        for _ in range(2):
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                for _ in sess.steps(max_steps=sess.global_step + 2):
                    MODULE_RANDOM.random()
        assert "they begin anew: MODULE_RANDOM." in caplog.text

    def test_that_are_saved_are_not(self, tmp_path, caplog):
        for _ in range(2):
            source, of_order = random.Random(1), torch.Generator().manual_seed(1)
            data = DataLoader(TensorDataset(X), batch_size=4, shuffle=True, generator=of_order)
            with session({"source": source, "values": Values(sum=0)}, tmp_path) as sess:
                for _ in sess.steps(data, max_steps=sess.global_step + 2):
                    source.random()
        assert not caplog.text

    def test_may_be_in_an_object_that_saves_itself(self, tmp_path, caplog):
        class Trainer:
            def __init__(self):
                self.model = torch.nn.Linear(1, 1)
                self.parts = {"optimizer": adam(self.model)}
                self.random = torch.Generator().manual_seed(1)

            def state_dict(self):
                parts = (self.model, self.parts["optimizer"])
                return {"parts": [one.state_dict() for one in parts], "random": self.random.get_state()}

            def load_state_dict(self, state):
                for one, saved in zip((self.model, self.parts["optimizer"]), state["parts"], strict=True):
                    one.load_state_dict(saved)
                self.random.set_state(state["random"])

        for end in (3, 5):
            trainer = Trainer()
            own = trainer.random
            with session({"trainer": trainer}, tmp_path) as sess:
                for (x,) in sess.steps(loader(), max_steps=end):
                    torch.rand((), generator=own)
                    train(trainer.model, trainer.parts["optimizer"], x)
        assert not caplog.text

    def test_may_be_those_of_the_data_or_of_an_evaluation(self, tmp_path, caplog):
        for end in (3, 5):
            source, of_evaluation = random.Random(1), torch.Generator().manual_seed(1)
            evaluation = DataLoader(TensorDataset(X), batch_size=4, generator=of_evaluation)

            def batches(source=source):
                while True:
                    yield torch.full((4, 1), source.random())

            with session({"values": Values(sum=0)}, tmp_path) as sess:
                for _ in sess.steps(batches(), max_steps=end):
                    list(evaluation)
        assert not caplog.text

    def test_may_be_seeded_by_each_step_or_drawn_from_in_evaluations_alone(self, tmp_path, caplog):
        for end in (4, 6):
            seeded, of_evaluation, of_both = torch.Generator(), np.random.default_rng(1), random.Random(1)
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                assert not sess.global_step or "they begin anew: of_both." in caplog.text
                for _ in sess.steps(max_steps=end):
                    seeded.manual_seed(sess.global_step)
                    torch.rand((), generator=seeded)
                    with sess.evaluating():
                        of_evaluation.random()
                        of_both.random()
                    of_both.random()
                assert end == 4 or len(caplog.records) == 1

    def test_that_are_seeded_by_each_epoch_are_named(self, tmp_path, caplog):
        for end in (5, 7):
            source = torch.Generator()
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                for epoch in sess.epochs(2):
                    source.manual_seed(epoch)
                    for _ in sess.steps([1, 2, 3, 4], max_steps=end):
                        torch.rand((), generator=source)
        assert "they begin anew: source." in caplog.text

    def test_no_variable_is_odd_enough_to_end_a_run(self, tmp_path):
        class Lazy:
            @property
            def __class__(self):
                raise RuntimeError("not ready")

            def __getattr__(self, name):
                raise RuntimeError("not ready")

        gone = weakref.proxy(Lazy())
        odd = random.SystemRandom(), Lazy(), np.random.RandomState(1)
        own, lazy, old = odd
        held = locals()
        with session({"values": Values(sum=0)}, tmp_path) as sess:
            for _ in sess.steps(max_steps=2):
                own.random()
        assert held["lazy"] is lazy
        assert (gone, old) != ()


class TestACountAroundTheSteps:
    @pytest.mark.parametrize(
        ("around", "said"),
        [
            (enumerate, "enumerate() around steps()"),
            (lambda steps: zip(range(100), steps, strict=False), "zip() around steps()"),
        ],
    )
    def test_that_begins_anew_is_named_at_the_restart(self, around, said, tmp_path, caplog):
        for end in (3, 5):
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                for _ in around(sess.steps(loader(), max_steps=end)):
                    pass
            assert (said in caplog.text) == (end == 5)

    def test_that_begins_at_the_step_is_right(self, tmp_path, caplog):
        for end in (3, 5):
            with session({"values": Values(sum=0)}, tmp_path) as sess:
                for _ in enumerate(sess.steps(loader(), max_steps=end), sess.global_step):
                    pass
        assert not caplog.text


def test_containers_in_values_stay_the_same_objects(tmp_path):
    averages, seen = {"weight": torch.zeros(1)}, [1]
    values = Values(averages=averages, seen=seen)
    with session({"values": values}, tmp_path) as sess:
        for _ in sess.steps(max_steps=1):
            averages["weight"] += 2
            seen.append(2)
    averages, seen = {"weight": torch.zeros(1)}, [1]
    values = Values(averages=averages, seen=seen)
    with session({"values": values}, tmp_path):
        assert values.averages is averages
        assert averages["weight"].tolist() == [2]
        assert values.seen is seen
        assert seen == [1, 2]


def test_two_values_that_share_one_container_each_get_their_own(tmp_path):
    for step in range(2):
        shared = []
        values = Values(best=shared, last=shared)
        with session({"values": values}, tmp_path) as sess:
            assert (values.best, values.last) == (([1], [2]) if step else ([], []))
            for _ in sess.steps(max_steps=1):
                values.best, values.last = [1], [2]


@pytest.mark.parametrize("when", ["built", "trained"])
def test_two_values_that_share_one_container_do_so_again(when, tmp_path):
    for step in range(2):
        shared = []
        values = Values(best=shared, last={"of": shared}) if when == "built" else Values(best=None)
        with session({"values": values}, tmp_path) as sess:
            assert when == "trained" or values.best is shared
            for _ in sess.steps(max_steps=step + 1):
                if when == "trained" and not step:
                    values.best, values.last = shared, {"of": shared}
                values.best.append(step)
            assert values.last["of"] is values.best
    assert values.best == [0, 1]
