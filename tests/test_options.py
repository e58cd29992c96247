"""The options: what each may be, how flat keywords and groups come together, and that nothing is given twice."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import signal
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

import stepguard
from stepguard.options import Guarding, Mirror, Options, Restoring, Saving, Stopping, Watching, each_option_once, refuse
from stepguard.options.checks import check_count, check_seconds, check_switch
from stepguard.testing import FakeSupervisor
from stepguard.watching import trial

GROUPS = [Saving, Stopping, Watching, Guarding, Restoring]


@pytest.mark.parametrize("value", [True, False, 0, 1, np.bool_(True)])
def test_a_switch_is_on_or_off(value):
    check_switch("progress", value)


@pytest.mark.parametrize("value", ["no", None, 3, 1.0, [True]])
def test_what_is_merely_true_or_false_is_none(value):
    with pytest.raises(TypeError, match="progress must be True or False, got"):
        check_switch("progress", value)


@pytest.mark.parametrize("value", [0, 0.5, 3600, math.inf, np.float32(2), np.int64(7)])
def test_seconds_are_any_number_that_is_not_negative(value):
    check_seconds("grace_secs", value)


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        ("5", {}, TypeError, "grace_secs must be a number of seconds >= 0, got str: '5'"),
        (True, {}, TypeError, "grace_secs must be a number of seconds >= 0, got bool: True"),
        (None, {}, TypeError, "grace_secs must be a number of seconds >= 0, got NoneType: None"),
        (math.nan, {}, ValueError, "grace_secs must be a number of seconds >= 0, got nan"),
        (-0.1, {"or_none": True}, ValueError, "grace_secs must be a number of seconds >= 0 or None, got -0.1"),
        (0, {"is_positive": True}, ValueError, "grace_secs must be a number of seconds > 0, got 0"),
        (math.inf, {"is_finite": True}, ValueError, "grace_secs must be a finite number of seconds >= 0, got inf"),
        (math.nan, {"least": -math.inf}, ValueError, "grace_secs must be a number of seconds, got nan"),
        (0, {"is_positive": True, "unit": "hours"}, ValueError, "grace_secs must be a number of hours > 0, got 0"),
    ],
)
def test_what_is_no_number_of_seconds_is_named(value, options, error, message):
    with pytest.raises(error, match=message):
        check_seconds("grace_secs", value, **options)


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        (2.0, {}, TypeError, "steps must be a whole number >= 0, got float: 2.0"),
        (True, {}, TypeError, "steps must be a whole number >= 0, got bool: True"),
        (None, {}, TypeError, "steps must be a whole number >= 0, got NoneType: None"),
        (0, {"least": 1, "or_none": True}, ValueError, "steps must be a whole number >= 1 or None, got 0"),
        (9, {"most": 8}, ValueError, "steps must be a whole number from 0 to 8, got 9"),
        (0, {"least": 1, "what": "returns"}, ValueError, "steps must be a number of returns >= 1, got 0"),
    ],
)
def test_what_is_no_whole_number_is_named(value, options, error, message):
    with pytest.raises(error, match=message):
        check_count("steps", value, **options)


@pytest.mark.parametrize(
    ("group", "options", "error"),
    [
        (Saving, {"save_model_secs": "often"}, TypeError),
        (Saving, {"save_model_secs": math.inf}, ValueError),
        (Saving, {"save_model_steps": 0}, ValueError),
        (Saving, {"save_model_steps": 1.5}, TypeError),
        (Saving, {"overhead": "1 %"}, TypeError),
        (Saving, {"overhead": 0}, ValueError),
        (Saving, {"overhead": 1}, ValueError),
        (Saving, {"min_interval_secs": None, "overhead": 0.01}, TypeError),
        (Saving, {"max_interval_secs": 1, "overhead": 0.01}, ValueError),
        (Saving, {"max_bytes_per_day": 0, "overhead": 0.01}, ValueError),
        (Saving, {"max_bytes_per_day": 10**9}, ValueError),
        (Saving, {"max_interval_secs": None}, ValueError),
        (Saving, {"save_at_end": "no"}, TypeError),
        (Saving, {"max_to_keep": -1}, ValueError),
        (Saving, {"keep_checkpoint_every_n_hours": 0}, ValueError),
        (Saving, {"checkpoint_basename": 1.5}, TypeError),
        (Saving, {"checkpoint_basename": ""}, ValueError),
        (Saving, {"max_unprotected_secs": None}, TypeError),
        (Stopping, {"stop_grace_secs": None}, TypeError),
        (Stopping, {"stop_on_sigterm": None}, TypeError),
        (Stopping, {"after_secs": 0}, ValueError),
        (Stopping, {"signals": "SIGTERM"}, TypeError),
        (Stopping, {"signals": ["SIGTERM"]}, TypeError),
        (Stopping, {"signals": [signal.SIGHUP]}, ValueError),
        (Stopping, {"stop_on_sigterm": False, "signals": [signal.SIGUSR2]}, ValueError),
        (Stopping, {"at": "noon"}, ValueError),
        (Stopping, {"at": [1]}, TypeError),
        (Stopping, {"at": math.nan}, ValueError),
        (Stopping, {"exit_codes": 75}, TypeError),
        (Stopping, {"exit_codes": {"bored": 1}}, ValueError),
        (Stopping, {"exit_codes": {"stopped": 256}}, ValueError),
        (Stopping, {"exit_codes": {"stopped": "75"}}, TypeError),
        (Stopping, {"exit_codes": {"error": 0}}, ValueError),
        (Watching, {"save_summaries_secs": -1}, ValueError),
        (Watching, {"peer_timeout_secs": -1}, ValueError),
        (Watching, {"progress": 3}, TypeError),
        (Watching, {"metrics_host": 3}, TypeError),
        (Guarding, {"nan_guard": "halt"}, ValueError),
        (Guarding, {"nan_returns": 0}, ValueError),
        (Restoring, {"start_over_when_all_damaged": "no"}, TypeError),
    ],
)
def test_a_group_checks_itself_and_names_what_is_wrong(group, options, error):
    with pytest.raises(error, match=next(iter(options))):
        group(**options)


def test_the_signals_of_a_run_are_those_given_once_each():
    assert Stopping().stop_signals == (signal.SIGTERM, signal.SIGUSR1)
    assert Stopping(signals=iter([signal.SIGUSR2, signal.SIGINT, 12])).stop_signals == (signal.SIGUSR2, signal.SIGINT)
    assert Stopping(signals=()).stop_signals == Stopping(stop_on_sigterm=False).stop_signals == ()
    assert replace(Stopping(stop_on_sigterm=False), stop_grace_secs=1).stop_signals == ()


def test_an_exit_code_is_that_of_the_reason_or_of_any_request():
    stopping = Stopping(exit_codes={"stopped": 75, "time_limit": 76, "finished": 10, "error": 11})
    reasons = ("sigterm", "interrupt", "request_stop", "time_limit", "finished", "error", "exit")
    assert [stopping.exit_code(one) for one in reasons] == [75, 75, 75, 76, 10, 11, None]
    assert Stopping().exit_code("sigterm") is None


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_public_keyword_only_and_never_changes(group):
    assert getattr(stepguard, group.__name__) is group
    with pytest.raises(TypeError):
        group(1)
    with pytest.raises(FrozenInstanceError):
        setattr(group(), fields(group)[0].name, 1)


@pytest.mark.parametrize(
    ("options", "is_on", "saves_last_step"),
    [
        ({}, True, True),
        ({"save_model_secs": 0}, False, False),
        ({"save_model_secs": None, "save_model_steps": 5}, True, True),
        ({"save_model_secs": 0, "save_at_end": True}, True, True),
        ({"save_model_secs": 0, "overhead": 0.01}, True, True),
        ({"save_model_secs": 0, "overhead": 0.01, "save_at_end": False}, True, False),
        ({"save_at_end": False}, True, False),
    ],
)
def test_a_run_saves_when_any_of_its_options_asks_for_it(options, is_on, saves_last_step):
    saving = Saving(**options)
    assert (saving.is_on, saving.saves_last_step) == (is_on, saves_last_step)


class TestFlatAndGrouped:
    def test_come_together_option_by_option(self):
        options = Options.of(save_model_secs=0, save_summaries_secs=5, saving=Saving(save_at_end=True))

        assert options.saving == Saving(save_model_secs=0, save_at_end=True)
        assert options.watching == Watching(save_summaries_secs=5)
        assert (options.stopping, options.guarding, options.restoring) == (Stopping(), Guarding(), Restoring())

    def test_an_option_of_a_group_wins_over_the_default_of_the_keyword(self):
        assert Options.of(save_model_secs=600, saving=Saving(save_model_secs=60)).saving.save_model_secs == 60

    def test_a_group_of_another_kind_is_named(self):
        with pytest.raises(TypeError, match=r"saving must be a stepguard\.Saving or None, got Stopping"):
            Options.of(saving=Stopping())

    @pytest.mark.parametrize("twice", [60, 600])
    def test_one_option_in_both_ways_is_an_error_that_names_both(self, twice):
        # Also where the keyword says what it would be by default.
        with pytest.raises(TypeError, match=rf"as save_model_secs={twice}, and in saving=Saving\(save_model_secs=30\)"):
            FakeSupervisor(save_model_secs=twice, saving=Saving(save_model_secs=30, save_at_end=True))

    def test_one_option_in_both_ways_is_seen_by_position_too(self):
        @each_option_once
        def front_door(logdir, save_model_secs=600, *, saving=None):
            pytest.fail("it was called")

        with pytest.raises(TypeError, match="save_model_secs is given twice"):
            front_door("runs/x", 60, saving=Saving(save_model_secs=600))

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda group: pickle.loads(pickle.dumps(group))])
    def test_a_copy_was_given_what_the_first_was(self, copied):
        group = copied(Saving(save_model_secs=60))
        assert group == Saving(save_model_secs=60)
        assert Options.of(save_model_secs=600, saving=group).saving.save_model_secs == 60

    def test_a_changed_copy_keeps_to_what_was_named(self):
        group = replace(Saving(save_at_end=True), save_model_steps=5)
        options = Options.of(save_model_secs=0, saving=group)
        assert options.saving == Saving(save_model_secs=0, save_model_steps=5, save_at_end=True)


def test_an_option_that_an_engine_has_no_use_for_is_refused_and_not_ignored():
    refuse(None, "max_to_keep", because="of this")
    refuse(Saving(save_at_end=True), "max_to_keep", because="of this")
    with pytest.raises(ValueError, match=r"Saving\(max_to_keep=5\): of this"):
        refuse(Saving(max_to_keep=5), "max_to_keep", because="of this")
    with pytest.raises(ValueError, match=r"Watching\(peer_timeout_secs=5\): the fake engine has no servers"):
        FakeSupervisor(watching=Watching(peer_timeout_secs=5))


def front_doors():
    import stepguard.tensorflow
    import stepguard.torch

    return [FakeSupervisor, stepguard.tensorflow.Supervisor, stepguard.torch.Supervisor]


def test_a_flat_keyword_has_the_default_of_its_group():
    defaults = {field.name: field.default for group in GROUPS for field in fields(group)}
    for door in front_doors():
        parameters = inspect.signature(door).parameters
        assert {"saving", "stopping", "watching", "guarding"} < parameters.keys()
        for name in parameters.keys() & defaults.keys():
            assert parameters[name].default == defaults[name], (door, name)


def test_a_front_door_takes_what_is_set_every_day_and_the_groups():
    fake, tensorflow, torch = (len(inspect.signature(door).parameters) for door in front_doors())
    assert fake < 20
    # The groups, and the mirror.
    assert tensorflow == 20 + len(GROUPS) + 1
    assert torch <= 20


@pytest.mark.parametrize("given", ["s3://bucket/run", Mirror("s3://bucket/run")])
def test_a_mirror_is_given_by_its_address_or_with_its_options(given):
    assert Options.of(mirror=given).mirror == Mirror("s3://bucket/run")
    assert Options.of().mirror is None


def test_a_mirror_that_is_no_address_is_named():
    with pytest.raises(TypeError, match="mirror must be an address such as 's3://bucket/run', a directory or"):
        Options.of(mirror=7)


def test_a_trial_has_no_mirror(tmp_path, monkeypatch):
    trial.write(tmp_path / "trial.json", trial.Trial(str(tmp_path / "place")))
    monkeypatch.setenv(trial.VARIABLE, str(tmp_path / "trial.json"))

    _, options = trial.applied(str(tmp_path / "run"), Options.of(mirror="s3://bucket/run"))
    assert options.mirror is None


def test_the_time_for_a_silent_server_is_that_of_the_session_manager():
    import stepguard.tensorflow

    manager = inspect.signature(stepguard.tensorflow.SessionManager).parameters
    assert manager["peer_timeout_secs"].default == Watching().peer_timeout_secs
