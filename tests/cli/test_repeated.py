"""A traceback that ends one start after another is shown once."""

import random
import sys

import pytest
from launches import ended, run

from stepguard.cli.launcher.relay import Repeated

TRACEBACK = b"""\
Traceback (most recent call last):
  File "train.py", line 9, in <module>
    raise ValueError("bad data")
ValueError: bad data
"""
CAUSED = TRACEBACK + b"\nDuring handling of it, another exception occurred:\n\n" + TRACEBACK.replace(b"bad", b"worse")


def passed(before, *blocks):
    repeated = Repeated(before)
    return b"".join(map(repeated.without, blocks)) + (b"" if repeated.is_whole else repeated.held)


@pytest.mark.parametrize("traceback", [TRACEBACK, CAUSED])
@pytest.mark.parametrize("logged", [b"", b"epoch 1\n", b"epoch 1\nepoch", TRACEBACK + b"caught\n", CAUSED + b"\n"])
def test_one_at_the_end_is_left_out_and_nothing_else(logged, traceback):
    written = logged + (b"\n" if logged.endswith(b"epoch") else b"") + traceback
    kept = written[: written.index(b"Traceback")]
    assert passed(written, written) == kept
    source = random.Random(1)
    for _ in range(100):
        cuts = sorted(source.sample(range(len(written)), 5))
        blocks = [written[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert passed(written, *blocks) == kept
        assert passed(b"", *blocks) == written


@pytest.mark.parametrize(
    "written",
    [
        TRACEBACK + b"but it went on\n",
        TRACEBACK[:-1],
        TRACEBACK.replace(b"line 9", b"line 10"),
        b"epoch 1 " + TRACEBACK,
        TRACEBACK[: len(TRACEBACK) // 2],
        b"",
    ],
)
def test_what_is_not_the_same_is_passed_on(written):
    assert passed(TRACEBACK, written) == written
    assert passed(TRACEBACK, *(bytes([one]) for one in written)) == written


def test_a_crash_that_repeats_is_shown_once_and_counted():
    code, _, errors = ended(run(sys.executable, "-c", "raise ValueError('bad data')"))
    assert code == 70
    assert errors.count("Traceback (most recent call last)") == 1
    assert "the same failure, 2 times in a row" in errors
    assert "3 starts in a row made no progress and ended in the same way (exit code 1: ValueError: bad data)" in errors


def test_another_crash_is_shown_too(tmp_path):
    script = (
        f"import os; os.mkdir('{tmp_path}/' + str(n := len(os.listdir('{tmp_path}')))); raise ValueError(f'row {{n}}')"
    )
    code, _, errors = ended(run(sys.executable, "-c", script))
    assert code == 70
    assert [f"ValueError: row {number}\n" in errors for number in range(3)] == [True] * 3


def test_a_program_that_hangs_after_its_traceback_has_shown_it():
    # The second start hangs, after the traceback, until it is killed.
    script = (
        "import os, signal, sys, traceback\n"
        "try: raise ValueError('bad data')\n"
        "except ValueError: traceback.print_exc()\n"
        "sys.stderr.flush()\n"
        "if int(os.environ['STEPGUARD_ATTEMPT']) < 2: os._exit(1)\n"
        "signal.pause()\n"
    )
    before = "from stepguard.cli.launcher import relay; relay._HELD_SECS = 0.1"
    launcher = run(sys.executable, "-c", script, before=before)
    shown = 0
    while shown < 2:
        shown += "Traceback (most recent call last)" in launcher.stderr.readline()
    launcher.terminate()
    ended(launcher)
