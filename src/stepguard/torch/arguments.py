"""The constructor's arguments, checked at the door: a wrong one is named before anything is built or written."""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

from stepguard.options import check_switch

_SECONDS = ("save_summaries_secs", "save_model_secs", "stop_grace_secs", "max_unprotected_secs")
_SWITCHES = (
    "is_chief",
    "save_at_end",
    "stop_on_sigterm",
    "start_over_when_all_damaged",
    "progress",
    "end_on_hang",
)
_MAY_BE_NONE = ("is_chief", "save_at_end")
_COUNTS = ("save_model_steps", "max_to_keep")


def check(**given: Any) -> None:
    """Check the types and values of the Supervisor's arguments.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what was found.
    """
    for name in _SECONDS:
        _check_seconds(name, given[name])
    for name in _COUNTS:
        _check_count(name, given[name], 1 if name == "save_model_steps" else 0)
    for name in _SWITCHES:
        check_switch(name, given[name], or_none=name in _MAY_BE_NONE)
    for name in ("summaries", "init_fn"):
        if given[name] is not None and not callable(given[name]):
            raise _wrong_type(name, "a function without arguments", given[name])
    writer = given["summary_writer"]
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise _wrong_type("summary_writer", "an object with add_scalar and close", writer)
    logdir = given["logdir"]
    if logdir is not None and not isinstance(logdir, (str, os.PathLike)):
        raise _wrong_type("logdir", "a path", logdir)
    if logdir and os.path.exists(logdir) and not os.path.isdir(logdir):
        raise NotADirectoryError(f"logdir: expected a directory, found the file {os.fspath(logdir)}; name another one")


def _check_seconds(name: str, value: Any) -> None:
    if value is None and name.startswith("save_"):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong_type(name, "a number of seconds", value)
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name}: expected a number of seconds >= 0, found {value}")


def _check_count(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong_type(name, "a whole number", value)
    if value < least:
        raise ValueError(f"{name}: expected a number >= {least}, or None, found {value}")


def _wrong_type(name: str, expected: str, found: Any) -> TypeError:
    return TypeError(f"{name}: expected {expected}, found {type(found).__name__}: {found!r:.80}")
