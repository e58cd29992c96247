"""Launchers that the tests of ``stepguard run`` start and wait for."""

import subprocess
import sys
import time
from pathlib import Path

from stepguard.store import CheckpointStore
from stepguard.watching import heartbeat, ledger

SOON_SECS = 60.0

TRAINING = [sys.executable, str(Path(__file__).with_name("training_program.py"))]


def run(*arguments, options=(), before=None, **how):
    """Start the launcher; delays are short unless the options say otherwise.

    ``before`` is Python that its process runs first, for a clock or a constant with which no busy machine interferes.
    """
    program = (
        ["-m", "stepguard"] if before is None else ["-c", f"{before}\nfrom stepguard.cli.main import main\nmain()"]
    )
    command = [sys.executable, *program, "run", "--first-delay-secs=0.01", *options, "--", *arguments]
    piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(one) for one in command], **{**piped, **how})


def ended(launcher):
    """Its exit code, and what it and its program wrote to stdout and stderr."""
    output, errors = launcher.communicate(timeout=SOON_SECS)
    return launcher.returncode, output, errors


def wait_until(condition, what):
    deadline = time.monotonic() + SOON_SECS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {SOON_SECS:g} s"
        time.sleep(0.01)
    return found


def is_training(logdir, role="chief"):
    beat = heartbeat.read_one(logdir, role)
    return beat if beat is not None and beat.phase == "training" and (beat.step or 0) > 0 else None


def is_gone(pid):
    return not heartbeat.is_running(pid, None)


def newest(logdir):
    return CheckpointStore(logdir).newest_good().checkpoint


def events(logdir, *names):
    return [one for one in ledger.read(logdir) if one["event"] in names]
