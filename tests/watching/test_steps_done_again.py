"""A run that crashes and does steps again says whether they are what they were: in log, ledger, status and metrics."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stepguard.cli.commands import status
from stepguard.options import Guarding, Saving, Watching
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat, ledger, trace
from stepguard.watching.trace import Record

AFTER_TEN = Saving(save_model_secs=0, save_model_steps=10, save_at_end=False)


class CrashError(Exception):
    """Ends a run without a last checkpoint, as a kill does."""


def train(
    logdir: Path,
    until: int,
    *,
    loss: Callable[[int], float] = float,
    crashes: bool = False,
    looking: Callable[[FakeSupervisor], object] | None = None,
    **options: Any,
) -> FakeSupervisor:
    sv = FakeSupervisor(str(logdir), **{"saving": AFTER_TEN, **options})
    try:
        with sv.managed_session() as session:
            while session.step < until:
                session.loss = loss(session.step)
                session.run_step()
                if session.step % 10 == 0 and sv._saving.writer is not None:
                    # Written before the next is due.
                    sv._saving.writer.drain(30)
            if looking is not None:
                looking(sv)
            if crashes:
                raise CrashError
    except CrashError:
        pass
    return sv


def replays(logdir: Path) -> list[dict[str, Any]]:
    return [one for one in ledger.read(logdir) if one["event"] == "replay"]


def test_a_run_that_does_the_same_steps_again_says_so_once_everywhere(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, 27, crashes=True)
    with caplog.at_level(logging.INFO, "stepguard.watching"):
        train(tmp_path, 45)
    sentence = "steps 20 to 26 were done again: bit for bit the same (loss)"
    (found,) = replays(tmp_path)
    assert {name: found[name] for name in ("step", "to_step", "outcome", "compared", "differs_at", "cause")} == {
        "step": 20,
        "to_step": 26,
        "outcome": "same",
        "compared": 7,
        "differs_at": None,
        "cause": None,
    }
    assert found["message"] == sentence
    assert [one.levelname for one in caplog.records if one.getMessage() == sentence] == ["INFO"]
    beat = heartbeat.read_one(tmp_path, "chief")
    assert beat is not None
    assert beat.replay is not None
    assert beat.replay["message"] == sentence
    shown = CliRunner().invoke(status.command, [str(tmp_path)]).output
    assert f"  replay    {sentence}" in shown
    told = json.loads(CliRunner().invoke(status.command, [str(tmp_path), "--json"]).output)
    assert told["processes"][0]["replay"]["outcome"] == "same"


def test_a_step_that_is_not_what_it_was_is_a_warning(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, 27, crashes=True)
    train(tmp_path, 45, loss=lambda step: step + (1e-9 if step == 23 else 0))
    (found,) = replays(tmp_path)
    assert (found["outcome"], found["differs_at"], found["compared"]) == ("differs", 23, 4)
    assert found["message"].startswith(
        "steps 20 to 22 were done again bit for bit; step 23 is not what it was: loss 23.000000000 then, "
        "23.000000001 now: "
    )
    assert [one.levelname for one in caplog.records if one.getMessage() == found["message"]] == ["WARNING"]
    assert found["message"][:40] in " ".join(CliRunner().invoke(status.command, [str(tmp_path)]).output.split())


def test_the_metrics_have_the_outcome_once_it_is_known(tmp_path: Path) -> None:
    told: list[str] = []

    def look(sv: FakeSupervisor) -> None:
        beat = sv._observer.now
        for part in sv._observer._watch.parts:
            part.look()
        assert beat.metrics_url is not None
        told.append(urllib.request.urlopen(beat.metrics_url, timeout=60).read().decode())

    watching = Watching(metrics_port=0)
    train(tmp_path, 27, crashes=True, looking=look, watching=watching)
    train(tmp_path, 37, crashes=True, looking=look, watching=watching)
    train(tmp_path, 45, loss=lambda step: -step, looking=look, watching=watching)
    assert "stepguard_replay_differs" not in told[0]
    assert re.search(r'^stepguard_replay_differs\{.*role="chief".*\} 0\.0$', told[1], re.MULTILINE)
    assert re.search(r'^stepguard_replay_differs\{.*role="chief".*\} 1\.0$', told[2], re.MULTILINE)


def test_nothing_is_said_where_nothing_was_lost(tmp_path: Path) -> None:
    train(tmp_path, 20)
    train(tmp_path, 40)
    train(tmp_path, 47, crashes=True)
    assert replays(tmp_path) == []


def test_a_crash_during_the_replay_is_no_obstacle(tmp_path: Path) -> None:
    train(tmp_path, 29, crashes=True)
    train(tmp_path, 24, crashes=True)
    train(tmp_path, 45)
    first, second = replays(tmp_path)
    assert (first["outcome"], first["to_step"]) == ("same", 23)
    assert "the first time, the run came to step 28" in first["message"]
    assert (second["outcome"], second["step"], second["to_step"]) == ("same", 20, 28)


def test_after_a_difference_the_steps_that_the_run_has_left_are_not_compared(tmp_path: Path) -> None:
    train(tmp_path, 29, crashes=True)
    train(tmp_path, 25, crashes=True, loss=lambda step: step + 1)
    train(tmp_path, 45, loss=lambda step: step + 1)
    first, second = replays(tmp_path)
    assert (first["outcome"], first["differs_at"]) == ("differs", 20)
    # Step 20 to 24 as they were the second time; nothing of the first time after that.
    assert (second["outcome"], second["to_step"]) == ("same", 24)


def test_a_fresh_start_in_a_used_logdir_is_compared_with_nothing(tmp_path: Path) -> None:
    train(tmp_path, 8, crashes=True)  # before the first checkpoint
    train(tmp_path, 18, crashes=True, loss=lambda step: step + 1)
    assert replays(tmp_path) == []
    train(tmp_path, 25, loss=lambda step: step + 1)
    (found,) = replays(tmp_path)
    assert (found["outcome"], found["step"], found["to_step"]) == ("same", 10, 17)


def test_steps_after_a_return_of_the_nan_guard_are_not_compared(tmp_path: Path) -> None:
    returned: list[int] = []

    def loss(step: int) -> float:
        if step == 24 and not returned:
            returned.append(step)
            return float("nan")
        return step + len(returned)

    train(tmp_path, 27, crashes=True, loss=loss, guarding=Guarding(nan_guard="return"))
    assert [one["to_step"] for one in ledger.read(tmp_path) if one["event"] == "return"] == [20]
    assert replays(tmp_path) == []
    train(tmp_path, 45, loss=lambda step: step + 1)
    (found,) = replays(tmp_path)
    assert (found["outcome"], found["step"], found["to_step"]) == ("same", 20, 26)


def test_without_a_trace_nothing_is_written_or_compared(tmp_path: Path) -> None:
    train(tmp_path, 27, crashes=True, watching=Watching(trace=None))
    train(tmp_path, 45, watching=Watching(trace=None))
    assert replays(tmp_path) == []
    assert not (tmp_path / "traces").exists()


def test_a_process_that_only_looks_leaves_the_trace_of_the_chief_alone(tmp_path: Path) -> None:
    def evaluate(_: FakeSupervisor) -> None:
        train(tmp_path, 30, saving=Saving(save_model_secs=0, save_at_end=False))

    train(tmp_path, 27, crashes=True, looking=evaluate)
    assert trace.roles(tmp_path) == ["chief"]
    steps = [one.step for one in trace.read(tmp_path) if isinstance(one, Record)]
    assert steps == list(range(27))


def test_a_trace_that_is_damaged_costs_the_comparison_and_nothing_else(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, 27, crashes=True)
    path = trace.path_of(tmp_path, "chief")
    path.write_bytes(path.read_bytes()[:40] + b"\xff" * 800)
    train(tmp_path, 35, crashes=True)
    assert replays(tmp_path) == []
    train(tmp_path, 45)
    assert [one["outcome"] for one in replays(tmp_path)] == ["same"]


@pytest.mark.parametrize("value", ["loss", True, 1, ""])
def test_another_value_of_the_option_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="trace must be 'numbers', 'batches' or None"):
        Watching(trace=value)


CHILD = """
    import sys
    from stepguard.options import Saving
    from stepguard.testing import FakeSupervisor
    sv = FakeSupervisor(sys.argv[1], saving=Saving(save_model_secs=0, save_model_steps=10))
    with sv.managed_session() as session:
        while True:
            session.loss = float(session.step)
            session.run_step()
            if session.step == 10:
                sv._saving.writer.drain(30)
            if session.step == 18:
                print("at 18", flush=True)
                sys.stdin.read()
"""


def test_a_sigkill_loses_no_step(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"at 18\n"
        child.send_signal(signal.SIGKILL)
    train(tmp_path, 25)
    (found,) = replays(tmp_path)
    assert found["message"] == "steps 10 to 17 were done again: bit for bit the same (loss)"
