"""Ways in which programs use the Supervisor: on ours each comes at least as far as on TensorFlow's own class.

These are the ones that differ most; ``uses.py`` runs all of them, and prints a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import pytest
from children_uses import STEPS, USES
from uses import compare
from zygote import Zygote

# More than any of these programs takes to end on a busy machine.
WITHIN_SECS = 60.0

HERE = (
    "managed_session and a loop",
    "prepare_or_wait_for_session, a loop, stop()",
    "a queue until OutOfRange",
    "SessionManager alone",
    "a subclass",
    "a worker on a server",
)
IN_THE_SOAK = (
    "no services, saves by hand",
    "a retry on AbortedError",
    "no global step",
    "a float global step",
    "two training threads",
    "ended by an error",
)
# Without managed_session, or without the services that save, SIGTERM ends a process as it does on TensorFlow's class.
NOT_STOPPED_BY_SIGTERM = (
    "prepare_or_wait_for_session, a loop, stop()",
    "no services, saves by hand",
    "SessionManager alone",
)
# What it had come to may be what is wrong.
NOT_SAVED_AT_ITS_END = ("ended by an error",)


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("uses-children"), "children_uses")
    yield zygote
    zygote.close()


@pytest.mark.parametrize("use", [*HERE, *(pytest.param(use, marks=pytest.mark.soak) for use in IN_THE_SOAK)])
def test_a_program_comes_at_least_as_far_as_on_tensorflows_class(use: str, children: Zygote, memory_path: Path) -> None:
    place = memory_path / f"use{list(USES).index(use)}"
    records = compare(children, use, place, with_end=False)
    theirs, ours = records["tensorflow"], records["stepguard"]

    assert ours.killed.status == theirs.killed.status == -SIGKILL
    # More than TensorFlow's reader finds, if the kill came while one checkpoint took the place of another of its name.
    assert ours.resumed.began >= ours.killed.on_disk
    assert ours.resumed.status == theirs.resumed.status
    assert ours.resumed.done >= STEPS
    assert ours.resumed.on_disk >= (ours.resumed.done if use not in NOT_SAVED_AT_ITS_END else ours.killed.on_disk)
    assert ours.sigterm.status == theirs.sigterm.status
    # A step that was done when the signal came may be reported after it, or not at all.
    assert ours.sigterm.on_disk >= (ours.sigterm.done if use not in NOT_STOPPED_BY_SIGTERM else 1)
    for run in (ours.resumed, ours.sigterm):
        assert run.secs < WITHIN_SECS
