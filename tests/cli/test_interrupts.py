"""Ctrl-C at any moment of a command, also while Python still imports: one line or none, and never a traceback.

``-X importtime`` says on stderr what was imported just now. These lines are the moments at which SIGINT is sent.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from logdirs import commit

# The first import after `stepguard.__main__` has answered for Ctrl-C.
FIRST = "stepguard.cli"
MODULE = [sys.executable, "-X", "importtime", "-m", "stepguard"]
# What pip writes into the script of an entry point.
WRITTEN = "import re\nimport sys\nfrom stepguard.__main__ import main\nsys.exit(main())"
SCRIPT = [sys.executable, "-X", "importtime", "-c", WRITTEN]
ENDED = (-signal.SIGINT, "")
IN_ONE_LINE = (130, "stepguard: interrupted\n")


# As in the background of a script, or under nohup.
DEAF = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]


def followed(imported: Callable[[subprocess.Popen[str], str], None], *command: object) -> tuple[int, str]:
    """Run a command, and call ``imported`` with each module once it is imported there.

    Returns the exit code, and what else is on stderr.
    """
    said = []
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("import time:"):
                    imported(process, line.rpartition("|")[2].strip())
                else:
                    said.append(line)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "".join(said)


def interrupted(moment: str, *command: object) -> tuple[int, str]:
    """How a command ends to which SIGINT is sent once the first module that ``moment`` matches is imported."""
    sent = []

    def imported(process: subprocess.Popen[str], name: str) -> None:
        if not sent and re.fullmatch(moment, name):
            process.send_signal(signal.SIGINT)
            sent.append(name)

    ending = followed(imported, *command)
    assert sent, f"{moment} was not imported: {ending}"
    return ending


@pytest.mark.parametrize("entry", [MODULE, SCRIPT], ids=["module", "script"])
@pytest.mark.parametrize("command", [["--version"], ["ls"], ["status", "--probe"], ["report", "-o", "-"]], ids=" ".join)
def test_ctrl_c_while_python_imports_ends_a_command_without_a_traceback(tmp_path, entry, command):
    commit(tmp_path, 1)
    called = [*entry, *command, *([] if command == ["--version"] else [tmp_path])]
    names: list[str] = []
    undisturbed = followed(lambda _, name: names.append(name), *called)
    moments = list(dict.fromkeys(names[names.index(FIRST) :]))
    endings = {name: interrupted(re.escape(name), *called) for name in [FIRST, *moments[1 :: len(moments) // 12]]}
    assert endings[FIRST] == ENDED
    # It may have come to its end before the signal does.
    assert set(endings.values()) <= {ENDED, IN_ONE_LINE, undisturbed}, endings


def test_a_command_that_ignores_ctrl_c_from_its_start_goes_on(tmp_path):
    commit(tmp_path, 1)
    assert interrupted(re.escape(FIRST), *DEAF, *MODULE, "ls", tmp_path) == (0, "")


def test_ctrl_c_in_the_middle_of_the_import_of_a_framework_ends_the_command_in_one_line(tmp_path):
    pytest.importorskip("torch")
    # At this moment NumPy loses the exception, and fails with another one later.
    commit(tmp_path, 1, saver_files=None)
    command = [*MODULE, "export", tmp_path, tmp_path / "out.npz", "--weights"]
    assert interrupted(r"numpy\..*\._exceptions", *command) == IN_ONE_LINE


HELD = """\
import sys
from stepguard.cli import interrupts
try:
    with interrupts.held():
        try:
            print("imports", flush=True)
            sys.stdin.readline()
        except BaseException:
            print("swallowed")
        print("whole")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    ("presses", "expected"),
    [(0, ("whole\n", 0)), (1, ("whole\ninterrupted\n", 0)), (2, ("", -signal.SIGINT))],
)
def test_ctrl_c_waits_for_the_end_of_what_is_held_and_a_second_one_does_not(presses, expected):
    with subprocess.Popen(
        [sys.executable, "-c", HELD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "imports\n"
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
                while process.poll() is None and is_caught(process.pid):
                    time.sleep(0.001)
            said, _ = process.communicate("\n" if presses < 2 else None, timeout=60.0)
        finally:
            process.kill()
    assert (said, process.returncode) == expected


def is_caught(pid: int) -> bool:
    """Whether the process has a handler of SIGINT: the first signal removes it."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) & 1 << (signal.SIGINT - 1))
