"""Checks the constructor's arguments, so that a wrong one is reported before anything is built or written."""

from __future__ import annotations

import os
from typing import Any

from stepguard.options import check_local, check_switch, wrong_type


def check(**given: Any) -> None:
    """Check the types of the Supervisor's arguments that are no options.

    Raises:
        TypeError, ValueError: the message names the argument, the expected and the found value.
    """
    check_switch("is_chief", given["is_chief"], or_none=True)
    for name in ("summaries", "init_fn"):
        if given[name] is not None and not callable(given[name]):
            raise wrong_type(name, "a function without arguments", given[name])
    writer = given["summary_writer"]
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise wrong_type("summary_writer", "an object with add_scalar and close", writer)
    logdir = given["logdir"]
    if logdir is not None and not isinstance(logdir, (str, os.PathLike)):
        raise wrong_type("logdir", "a path", logdir)
    if logdir:
        check_local("logdir", logdir)
    if logdir and os.path.exists(logdir) and not os.path.isdir(logdir):
        raise NotADirectoryError(f"logdir: expected a directory, found the file {os.fspath(logdir)}; name another one")
