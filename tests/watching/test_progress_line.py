"""The progress line, in a real pseudo-terminal, and where there is none."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from stepguard.watching import ledger

CHILD = """
    import logging, sys, time
    logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
    logging.getLogger("stepguard").setLevel(logging.WARNING)
    from stepguard.testing import FakeSupervisor
    from stepguard import Watching
    watching = Watching(progress=True, total_steps=400)
    sv = FakeSupervisor(sys.argv[1], save_model_secs=0, save_model_steps=20, watching=watching)
    with sv.managed_session() as session:
        for number in range(300):
            session.run_step()
            time.sleep(0.01)
            if number == 150:
                print("a line of the program")
                logging.info("a line of its log")
"""


def run(logdir: Path, columns: int | None) -> tuple[str, str]:
    """Standard output and error of a run; both in one terminal of that width, or piped."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(logdir)]
    if columns is None:
        # A checkpoint that falls due while the one before it is still written would be told of.
        command[2] = command[2].replace("save_model_steps=20", "save_model_steps=200")
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return ended.stdout, ended.stderr
    master, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # What Linux answers when the other end is closed.
            break
        if not block:
            break
        shown += block
    os.close(master)
    assert process.wait(60) == 0, shown.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()), ""


def test_shows_the_step_the_rate_the_time_left_and_the_last_checkpoint(tmp_path: Path) -> None:
    shown, _ = run(tmp_path, columns=80)

    lines = [line.strip() for line in re.split(r"[\r\n]+", shown) if line.startswith("step ")]
    assert lines
    assert all(len(line) <= 80 for line in lines), lines
    last = re.search(r"step (\d+)/400 .* (\d+)/s, (\d+) s left, saved (\d+) \d+ s ago", lines[-1])
    assert last, lines
    step, saved = int(last.group(1)), int(last.group(4))
    assert 0 < saved <= step <= 300
    assert saved % 20 == 0
    # What the program prints and logs ends its own line, and the progress line is erased before it.
    assert "a line of the program\r\n" in shown
    assert "LOG a line of its log\r\n" in shown
    assert "ago LOG" not in shown
    assert "None" not in shown
    assert "step 300/400" in lines[-1]


def test_what_is_printed_into_a_file_goes_there(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(CHILD).replace("range(300)", "range(152)"), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)

    assert process.communicate(timeout=60)[0] == "a line of the program\n"
    os.close(master)


def test_is_silent_without_a_terminal(tmp_path: Path) -> None:
    assert run(tmp_path, columns=None) == ("a line of the program\n", "LOG a line of its log\n")


def test_a_terminal_that_goes_away_is_no_end_of_the_run(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(CHILD).replace("INFO", "CRITICAL"), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    os.read(master, 1)
    os.close(master)

    assert process.wait(60) == 0
    assert [one["reason"] for one in ledger.read(tmp_path) if one["event"] == "stop"] == ["finished"]
