"""What a proof has found stays found, whatever becomes of the rest; and a fault that came too late is none."""

from __future__ import annotations

import json
import signal
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from stepguard.cli.commands.prove import command
from stepguard.cli.proving import faults, runs
from stepguard.cli.proving.comparing import Comparison
from stepguard.cli.proving.faults import Done, Fault
from stepguard.cli.proving.proof import AGAIN, NotTriedError, Proof, Result
from stepguard.cli.proving.runs import Run
from stepguard.cli.proving.scratch import Scratch

PROBLEM = ("it ended at step 3",)


@pytest.mark.parametrize("error", [NotTriedError("disk: the time was over"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_difference_is_the_verdict_also_if_the_rest_cannot_be_tried(tmp_path, monkeypatch, error, as_json):
    def climb(proof):
        place = proof._place("kill")
        place.logdir.mkdir(parents=True)
        proof._add(Result("kill", Run(place), Comparison((200, 3), problems=PROBLEM)))
        raise error

    monkeypatch.setattr(Proof, "_climb_all", climb)
    ended = CliRunner().invoke(
        command, [*(["--json"] if as_json else []), f"--scratch={tmp_path}", "--", "python", "train.py"]
    )

    assert ended.exit_code == 1, ended.output
    [kept] = tmp_path.glob("*/kill/logdir-0")
    if as_json:
        found = json.loads(ended.stdout)
        assert (found["verdict"], Path(found["runs"][0]["logdir"])) == ("different", kept)
        assert found["remarks"] == [f"the rest could not be tried: {error}"]
    else:
        assert "NOT PROVEN for train.py" in ended.output


def test_without_a_difference_nothing_is_kept_and_nothing_was_tried(tmp_path, monkeypatch):
    def climb(proof):
        proof._add(Result(AGAIN, Run(proof._place("again")), Comparison((200, 200))))
        raise NotTriedError("kill: the time was over")

    monkeypatch.setattr(Proof, "_climb_all", climb)
    ended = CliRunner().invoke(command, [f"--scratch={tmp_path}", "--", "python", "train.py"])

    assert ended.exit_code == 2, ended.output
    assert list(tmp_path.iterdir()) == []


class Ended:
    """A start of a program that came to its end by itself, just before it would have felt its fault."""

    pid, began, code = 1, 0.0, 0

    def wait_for(self, is_so):
        return True

    def wait(self, look):
        return self.code

    def lines(self):
        return []

    def ask(self):
        pass

    kill = interrupt = ask


@pytest.fixture
def ended(monkeypatch):
    """Returns what becomes of a run whose only start has ended before the fault, which is said to be done."""
    monkeypatch.setattr(runs, "last_stop", lambda place, since: {"reason": "trial", "step": 200})
    monkeypatch.setattr(runs, "Live", lambda logdir: types.SimpleNamespace(step=lambda: 150, logdir=logdir))

    def go(kind, place):
        program = types.SimpleNamespace(start=lambda environment: Ended())
        return runs.run(program, place, [Fault(kind, 150, 0.0, 0.5)], tell=lambda start, step: None)

    return go


@pytest.mark.parametrize("kind", ["kill", "sigterm", "interrupt", "process"])
def test_a_fault_that_came_too_late_was_not_tried(ended, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_kill_one", lambda fault, live: Done(True, "worker-1"))
    done = ended(kind, Scratch(tmp_path).place("run", stop_at=200, save_every=20))

    assert done.missed == [f"{kind}: the program had ended before"]
    assert not Result(kind, done, Comparison((200, 200))).is_tried


def test_the_last_checkpoint_of_a_run_that_is_over_is_not_damaged(tmp_path, monkeypatch):
    damaged = []
    monkeypatch.setattr(faults, "damage_newest", lambda *told: damaged.append(told) or "a file")
    live = types.SimpleNamespace(step=lambda: 150, logdir=tmp_path)
    running = Ended()

    assert not faults.inject(Fault("damage", 150, 0.0, 0.5), running, live).is_done
    assert damaged == []
    running.code = -signal.SIGKILL
    assert faults.inject(Fault("damage", 150, 0.0, 0.5), running, live).is_done
    assert len(damaged) == 1
