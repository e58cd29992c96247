"""A process ends, soon and with its own exit status, whatever it has left of its run: sessions, threads, blocks."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from states_at_end import STATUS
from zygote import Child, Zygote

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "src"

# A few seconds of patience, and what the interpreter needs to clear up on a busy machine; a hang lasts for ever.
WITHIN_SECS = 60.0
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def assert_ends(child: Child, state: str) -> None:
    assert child.wait(WITHIN_SECS) == STATUS[state], child.output
    assert "Fatal Python error" not in child.output
    assert "terminate called" not in child.output


@pytest.mark.parametrize("state", STATUS)
@pytest.mark.parametrize(
    "kind",
    ["local", "server", pytest.param("sync", marks=pytest.mark.soak), pytest.param("partial", marks=pytest.mark.soak)],
)
def test_a_tensorflow_program_ends(tensorflow_children: Zygote, tmp_path: Path, kind: str, state: str) -> None:
    assert_ends(tensorflow_children.start("ends_in", state=state, logdir=str(tmp_path), kind=kind), state)


@pytest.fixture(scope="module")
def ps(tensorflow_children: Zygote) -> Iterator[tuple[Child, str]]:
    """A parameter server, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    child = tensorflow_children.start("serves", address=address)
    child.wait_for("serving")
    yield child, address
    child.kill()


@pytest.mark.parametrize("state", STATUS)
def test_a_replica_ends(tensorflow_children: Zygote, ps: tuple[Child, str], tmp_path: Path, state: str) -> None:
    child = tensorflow_children.start("ends_in", state=state, logdir=str(tmp_path), kind="replica", ps=ps[1])
    assert_ends(child, state)


@pytest.mark.parametrize("state", ["never stopped", "never closed", "a thread still trains"])
def test_a_replica_ends_whose_parameter_server_is_silent(
    tensorflow_children: Zygote, ps: tuple[Child, str], tmp_path: Path, state: str
) -> None:
    server, address = ps
    child = tensorflow_children.start(
        "ends_in", state=state, logdir=str(tmp_path), kind="silent", ps=address, ps_pid=server.pid
    )
    try:
        assert child.wait(WITHIN_SECS) in (STATUS[state], 1), child.output
    finally:
        server.send(signal.SIGCONT)


# A thread that trains on aborts the process with PyTorch alone, too: it comes back to an interpreter that is gone.
@pytest.mark.parametrize("state", [state for state in STATUS if state != "a thread still trains"])
def test_a_pytorch_program_ends(torch_children: Zygote, tmp_path: Path, state: str) -> None:
    assert_ends(torch_children.start("ends_in", state=state, logdir=str(tmp_path)), state)


@pytest.mark.parametrize("state", [state for state in STATUS if state != "a thread still trains"])
def test_a_jax_program_ends(jax_children: Zygote, tmp_path: Path, state: str) -> None:
    assert_ends(jax_children.start("ends_in", state=state, logdir=str(tmp_path)), state)


def python_at_hand(version: str) -> str:
    """A Python of that version: the one that runs this, one on the path, or one that is installed beside it.

    Skips where there is none that starts.
    """
    running = "{}.{}".format(*sys.version_info)
    beside = Path(sys.base_prefix).parent.glob(f"*{version}*/bin/python{version}")
    found = [sys.executable] if version == running else [shutil.which(f"python{version}"), *map(str, beside)]
    for python in filter(None, found):
        command = [python, "-c", "import stepguard.testing"]
        if subprocess.run(command, env=environment(), capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip(f"no Python {version} at hand that imports stepguard.testing")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(HERE)])}


@pytest.mark.parametrize("version", PYTHONS)
def test_the_core_ends_on_each_python_at_hand(tmp_path: Path, version: str) -> None:
    """With the fake engine: the frameworks are installed for one Python only. All states at once."""
    python = python_at_hand(version)
    running = {state: _start(python, state, tmp_path / str(number)) for number, state in enumerate(STATUS)}
    try:
        for state, process in running.items():
            process.wait(WITHIN_SECS)
            output = Path(f"{process.args[-1]}.output").read_text()  # type: ignore[index]
            assert (state, process.returncode) == (state, STATUS[state]), output
            assert "Fatal Python error" not in output
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _start(python: str, state: str, logdir: Path) -> subprocess.Popen[bytes]:
    with open(f"{logdir}.output", "wb") as output:
        command = [python, str(HERE / "ends_fake.py"), state, str(logdir)]
        return subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
