"""Processes that are killed while they copy, and machines whose disk goes away: another one goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import faults
import mirrors
import pytest
from mirrors import names, train, wait_until

URL = "s3://bucket/runs/x"
CHILD = Path(__file__).with_name("mirrored_child.py")


@pytest.fixture
def start(network):
    started = []

    def start(logdir, steps=50, **env):
        child = subprocess.Popen(
            [sys.executable, CHILD, logdir, URL, str(steps)],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def wait_for_step(child, step):
    for line in child.stdout:
        if int(line) >= step:
            return
    raise AssertionError(child.stderr.read())


# The requests of one copy, in their order: method, part of the path, how many of them pass, and bytes of another file.
PHASES = {
    "the first part of a file": ("PUT", "/model.ckpt-4/padding.bin", 0, 20 << 20),
    "another part of a file": ("PUT", "/model.ckpt-4/padding.bin", 2, 20 << 20),
    "a whole file": ("PUT", "/model.ckpt-4/state.json", 0, 0),
    "the manifest": ("PUT", "/model.ckpt-4.manifest.json", 0, 0),
    "the removal of an old manifest": ("POST", "?delete", 0, 0),
    "the removal of old files": ("POST", "?delete", 1, 0),
    "the state file": ("PUT", "/checkpoint", 3, 0),
    "the ledger": ("PUT", "/run.jsonl", 3, 0),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_a_request_the_mirror_has_only_whole_checkpoints(network, start, tmp_path, phase):
    method, part, number, padding = PHASES[phase]
    left = [number]
    child: subprocess.Popen

    def kill(handler, body):
        if left[0]:
            left[0] -= 1
            return body
        os.kill(child.pid, signal.SIGKILL)
        return handler.cut()

    network.fails(faults.only(method, part, kill))
    child = start(tmp_path / "run", PADDING=str(padding))
    child.wait(150)
    network.fails(None)

    assert child.returncode == -signal.SIGKILL
    place = mirrors.copies(URL)
    there = place.listed()
    assert there[0].step >= 2
    for one in there:
        assert place.damages(one, place.manifest(one.name), reads=True) == []
    # The disk has gone with the machine.
    shutil.rmtree(tmp_path / "run")
    assert train(tmp_path / "elsewhere", URL, 1, lease_secs=0.5) == there[0].step
    tops = {one.key.partition("/")[0] for one in place.remote.objects("model")}
    assert all(f"{one.removesuffix('.manifest.json')}.manifest.json" in tops for one in tops)


def test_a_logdir_that_is_removed_while_it_trains_and_then_its_machine_cost_nothing_that_was_mirrored(
    network, start, tmp_path
):
    child = start(tmp_path / "run")
    wait_for_step(child, 3)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    # It makes the logdir again, and goes on.
    wait_for_step(child, 6)
    child.kill()
    child.wait()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    newest = mirrors.copies(URL).listed()[0].step

    assert newest >= 6
    assert train(tmp_path / "elsewhere", URL, 2, lease_secs=0.5) == newest


def test_two_machines_that_fight_for_one_mirror_leave_one_run(network, start, tmp_path):
    # At once: on a busy machine one would else be at its end before the other is there.
    begin = tmp_path / "begin"
    first, second = (start(tmp_path / name, 25, LEASE="0.6", AWAITS=str(begin)) for name in ("one", "two"))
    assert [one.stdout.readline() for one in (first, second)] == ["ready\n"] * 2
    begin.touch()
    ends = {one.wait(150): one for one in (first, second)}

    assert sorted(ends)[0] == 0
    assert len(ends) == 2
    assert "LogdirInUseError" in next(one for code, one in ends.items() if code).stderr.read()
    place = mirrors.copies(URL)
    assert place.listed()[0].step >= 25
    assert all(not place.damages(one, place.manifest(one.name), reads=True) for one in place.listed())


def test_a_process_that_ends_in_the_middle_of_a_copy_ends_in_time(network, start, tmp_path):
    child = start(tmp_path / "run", 100_000, GRACE="1", WAITS_NOT="1")
    wait_until(lambda: names(URL))
    network.fails(faults.only("PUT", "state.json", faults.slow(600)))
    network.requests.clear()
    wait_until(lambda: any(verb == "PUT" and "state.json" in path for verb, path, _ in list(network.requests)))
    child.send_signal(signal.SIGTERM)

    assert child.wait(60) == -signal.SIGTERM
    assert "is not there yet" in child.stderr.read()
    assert names(URL)
