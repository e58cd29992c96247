"""What the ledger tells of the options of a start: all that are not the defaults, as JSON, and no secret."""

from __future__ import annotations

import datetime as dt
import functools
import json
import signal
from pathlib import Path

import numpy as np
import pytest

from stepguard.options import Mirror, Options, Restoring, Saving, Stopping, Watching
from stepguard.watching import configuration


def told(**given):
    """What a ledger has, after its way through JSON."""
    return json.loads(json.dumps(configuration.told(Options.of(**given)), allow_nan=False))


def on_commit(_committed):
    pass


class Uploads:
    def __call__(self, _committed):
        pass

    def __repr__(self):
        return "Uploads(token='hunter2')"


def test_defaults_are_left_out_however_they_are_given():
    assert told() == {}
    assert told(saving=Saving(save_model_secs=600), save_model_steps=None, watching=Watching()) == {}


def test_keywords_and_groups_are_told_by_the_same_names():
    assert told(save_model_secs=60, saving=Saving(max_to_keep=7), hang_secs=1.5) == {
        "saving.save_model_secs": 60,
        "saving.max_to_keep": 7,
        "watching.hang_secs": 1.5,
    }


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        ("saving", "keep_best", ("val_loss", "min", 3), ["val_loss", "min", 3]),
        ("saving", "save_model_steps", np.int64(5), 5),
        ("saving", "frozen_apart", np.bool_(True), True),
        ("saving", "on_commit", on_commit, f"{__name__}.on_commit"),
        ("saving", "on_commit", functools.partial(on_commit), "functools.partial"),
        ("saving", "on_commit", Uploads(), f"{__name__}.Uploads"),
        ("stopping", "signals", {signal.SIGINT}, ["SIGINT"]),
        ("stopping", "exit_codes", {"finished": 0, "stopped": 75}, {"finished": 0, "stopped": 75}),
        ("stopping", "at", dt.datetime(2030, 1, 2, tzinfo=dt.timezone.utc), "2030-01-02T00:00:00+00:00"),
        ("restoring", "init_from", {"model": Path("a") / "b"}, {"model": "a/b"}),
        ("restoring", "leave_out", ("model.head.*",), ["model.head.*"]),
        ("watching", "trace", None, None),
    ],
)
def test_values_of_each_kind_are_told_plainly(group, name, value, expected):
    kinds = {"saving": Saving, "stopping": Stopping, "watching": Watching, "restoring": Restoring}
    assert told(**{group: kinds[group](**{name: value})}) == {f"{group}.{name}": expected}


def test_no_secret_of_a_mirror_is_told():
    store_options = {"secret_access_key": "hunter2", "endpoint": "https://user:hunter2@example.com"}
    found = told(mirror=Mirror("s3://bucket/run", keep=9, store_options=store_options))
    assert found == {
        "mirror.url": "s3://bucket/run",
        "mirror.keep": 9,
        "mirror.store_options": ["secret_access_key", "endpoint"],
    }
    assert told(mirror="/mnt/second") == {"mirror.url": "/mnt/second"}


def test_a_line_that_is_damaged_or_not_ours_is_told_by_the_same_rules():
    deep = json.loads("[" * 500 + "]" * 500)
    assert configuration.as_read({"x.a": deep, "x.b": {"c": {"d": 1}}, "x.url": "http://u:hunter2@h"}) == {
        "x.a": ["..."],
        "x.b": {"c": "..."},
        "x.url": "http://***@h",
    }
    assert configuration.as_read(None) is configuration.as_read([1]) is None


def test_changes_name_both_values_and_defaults_and_an_older_start_has_none():
    before, after = (
        {"saving.max_to_keep": 7, "saving.overhead": 0.01},
        {"saving.max_to_keep": 8, "watching.trace": None},
    )
    assert configuration.changes(before, after) == [
        ("saving.max_to_keep", "7", "8"),
        ("watching.trace", "the default", "None"),
        ("saving.overhead", "0.01", "the default"),
    ]
    assert configuration.changes(after, after) == configuration.changes(None, after) == []
