"""``stepguard run`` and its program on a system that has nothing of what only Linux has, with psutil and without."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from launches import TRAINING, ended, events, is_gone, is_training, newest, run, wait_until

# Every interpreter of the test reads this at its start.
SITE = """
    import os, resource, signal, sys
    for name in ("sigwaitinfo", "sigtimedwait", "SIGRTMIN", "SIGRTMAX"):
        delattr(signal, name)
    # One that nothing here uses, in place of a signal that only macOS has.
    signal.SIGEMT = signal.SIGXCPU
    del os.fdatasync, resource.prlimit
    import stepguard.disk.system
    stepguard.disk.system._is_linux = False
"""

HANGING = """
    import collections, itertools, sys
    from stepguard import Watching
    from stepguard.testing import FakeSupervisor
    with FakeSupervisor(sys.argv[1], watching=Watching(hang_secs=0.5, end_on_hang=True)).managed_session() as session:
        session.run_step()
        collections.deque(itertools.repeat(None), maxlen=0)
"""


@pytest.fixture(params=["with psutil", "without psutil"])
def elsewhere(request, tmp_path):
    """The environment of processes of another system."""
    site = tmp_path / "site"
    site.mkdir()
    lines = "" if request.param == "with psutil" else "sys.modules['psutil'] = None\n"
    (site / "sitecustomize.py").write_text(textwrap.dedent(SITE) + lines)
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_a_program_that_is_killed_is_started_again_and_goes_on(tmp_path, children, elsewhere):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, "die", 12, env=elsewhere)
    children.append(launcher)
    code, _, errors = ended(launcher)
    assert code == 0, errors
    assert "SIGKILL" in errors
    assert newest(logdir).step == 12
    assert [one["step"] for one in events(logdir, "restore")] == [5]


def test_a_stop_reaches_the_program_and_costs_no_step(tmp_path, children, elsewhere):
    logdir = tmp_path / "run"
    launcher = run(*TRAINING, logdir, "go on", env=elsewhere)
    children.append(launcher)
    wait_until(lambda: is_training(logdir), "the training")
    launcher.send_signal(signal.SIGTERM)
    code, _, errors = ended(launcher)
    assert code == 128 + signal.SIGTERM, errors
    (stop,) = events(logdir, "stop")
    assert newest(logdir).step == stop["step"]


def test_a_killed_launcher_leaves_its_program_and_the_next_one_is_told(tmp_path, children, elsewhere):
    logdir = tmp_path / "run"
    first = run(*TRAINING, logdir, "go on", env=elsewhere)
    children.append(first)
    beat = wait_until(lambda: is_training(logdir), "the training")
    first.kill()
    first.wait()
    try:
        wait_until(lambda: is_training(logdir).step > beat.step, "a step after the end of the launcher")
        code, _, errors = ended(run(*TRAINING, logdir, "go on", options=["--max-restarts=0"], env=elsewhere))
        assert code != 0
        assert f"found process {beat.pid} on" in errors
    finally:
        os.kill(beat.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(beat.pid), "the end of the program")
    last = run(*TRAINING, logdir, "go on", 1, env=elsewhere)
    children.append(last)
    code, _, errors = ended(last)
    assert code == 0, errors
    assert events(logdir, "restore")


def test_a_hang_in_c_is_reported_and_ended(tmp_path, elsewhere):
    logdir = tmp_path / "run"
    command = [sys.executable, "-c", textwrap.dedent(HANGING), str(logdir)]
    hung = subprocess.run(command, env=elsewhere, stderr=subprocess.PIPE, text=True, check=False)
    assert hung.returncode == -signal.SIGKILL, hung.stderr
    (hang,) = events(logdir, "hang")
    with open(hang["stacks"]) as stacks:
        assert "<module>" in stacks.read()
