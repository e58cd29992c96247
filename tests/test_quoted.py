"""What the package logs of a logdir that somebody has prepared."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from stepguard.disk import files
from stepguard.store import CheckpointStore
from stepguard.words import logger

EVIL = "\x1b]0;owned\x07\nWARNING forged\u202e"
SOURCE = Path(files.__file__).parents[1]


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("value", [EVIL, Path(EVIL), ValueError(EVIL), OSError(5, EVIL, EVIL)], ids=type)
def test_what_a_line_quotes_is_shown_on_one_line_with_escapes(value: object, caplog: pytest.LogCaptureFixture) -> None:
    logger("stepguard.tests").warning("%s: %d steps", value, 3)
    assert caplog.messages[0].isprintable()
    assert caplog.messages[0].endswith(": 3 steps")
    assert "owned" in caplog.messages[0]


def test_what_needs_no_escape_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("plain: é")
    logger("stepguard.tests").warning("%s %r %.1f", error, "it's", 0.25)
    assert caplog.records[0].args == (error, "it's", 0.25)
    assert caplog.messages == ['plain: é "it\'s" 0.2']


def test_an_error_that_cannot_be_described_does_not_fail_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL):
        logger("stepguard.tests").warning("%s", UnspeakableError())


def test_names_in_a_logdir_are_escaped_in_what_a_start_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    (tmp_path / f".stage-{EVIL}").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(1, "not permitted", os.fspath(path))

    monkeypatch.setattr(files, "remove", refuse)
    store.sweep()
    (message,) = caplog.messages
    assert message.isprintable()
    assert "owned" in message


def test_every_module_takes_its_logger_from_there() -> None:
    wrong = [
        path
        for path in SOURCE.rglob("*.py")
        if path.name != "log.py" and re.search(r"^_log = logging\.getLogger", path.read_text(), re.MULTILINE)
    ]
    assert wrong == []
