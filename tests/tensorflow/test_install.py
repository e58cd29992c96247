"""Unchanged programs under our Supervisor: ``python -m stepguard.tensorflow PROGRAM`` and ``install()``.

Each process imports TensorFlow, which takes seconds: all that can share one does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorflow as tf
from graphs import committed

from stepguard.tensorflow import Supervisor
from stepguard.tensorflow.__main__ import main

v1 = tf.compat.v1

PROGRAM = """
    import os, sys
    import model
    import tensorflow as tf
    from tensorflow.python.training import supervisor
    from tensorflow.python.training.supervisor import Supervisor
    import stepguard.tensorflow

    assert __name__ == "__main__"
    assert sys.argv[1:] == ["--steps", "3"], sys.argv
    assert os.path.isabs(__file__)
    assert "program" in os.path.relpath(sys.argv[0], os.environ["FOLDER"]), sys.argv
    ways = {
        "by alias": tf.compat.v1.train.Supervisor,
        "by module": supervisor.Supervisor,
        "by name": Supervisor,
        "by name in a module of its own": model.Supervisor,
        "by a deeper alias": tf.compat.v1.compat.v1.train.Supervisor,
    }
    for way, found in ways.items():
        assert found is stepguard.tensorflow.Supervisor, way

    with tf.Graph().as_default():
        step = model.step()
        sv = model.Supervisor(logdir=os.environ["LOGDIR"])
        with sv.managed_session() as session:
            for _ in range(3):
                session.run(step)
    print("done", flush=True)
    if __package__:
        raise ZeroDivisionError("on purpose")
    sys.exit(7)
"""


INSTALLING = """
    import sys
    import tensorflow as tf
    import model                    # has taken TensorFlow's by name already
    theirs = model.Supervisor
    import stepguard.tensorflow
    assert model.Supervisor is theirs is tf.compat.v1.train.Supervisor, "importing replaces nothing"
    from stepguard.tensorflow import Supervisor, install

    class Derived(theirs):
        pass

    install()
    install()
    assert model.Supervisor is tf.compat.v1.train.Supervisor is Supervisor
    from tensorflow.python.training.supervisor import Supervisor as later
    assert later is Supervisor
    assert Derived.__bases__ != (Supervisor,), "what was derived before stays what it is"

    # Under eager execution, which is where a program of TensorFlow 2 begins:
    for graph in (None, tf.Graph()):
        try:
            Supervisor(graph=graph)
        except RuntimeError as error:
            assert "eager" in str(error)
        else:
            raise AssertionError("built under eager execution")

    # With all of version 2 off, which only a process as a whole can be:
    import os
    tf.compat.v1.disable_v2_behavior()
    step = model.step()
    with tf.compat.v1.train.Supervisor(logdir=os.environ["LOGDIR"]).managed_session() as session:
        for _ in range(4):
            session.run(step)
"""

NEVER_STOPPED = """
    import os, sys, time
    import model
    from stepguard.store import CheckpointStore
    from stepguard.tensorflow import Supervisor

    logdir, way = os.environ["LOGDIR"], sys.argv[1]
    step = model.graph_step()
    with step.graph.as_default():
        sv = Supervisor(logdir=logdir, save_model_secs=0.05, save_summaries_secs=0.05)
    session = sv.prepare_or_wait_for_session()
    for number in range(1, 6):
        session.run(step)
    store = CheckpointStore(logdir)
    while not any(one.is_committed and one.step == 5 for one in store.candidates()):
        time.sleep(0.01)
    # Threads that are in TensorFlow all the time: one that is when the interpreter goes makes C++ abort.
    for _ in range(4):
        sv.loop(None, session.run, args=[step])
    time.sleep(0.1)
    print(time.time(), flush=True)
    if way == "exit":
        sys.exit(3)
"""

MODEL = """
    import tensorflow.compat.v1 as tf
    from tensorflow.python.training.supervisor import Supervisor

    def step():
        return tf.assign_add(tf.train.get_or_create_global_step(), 1)

    def graph_step():
        with tf.Graph().as_default():
            return step()
"""


class Folder:
    """A folder with programs, and the means to run them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # logdir -> when the process that trained there had ended, in Unix time.
        self.ended_at: dict[str, float] = {}
        for name, text in {
            "program": PROGRAM,
            "model": MODEL,
            "installing": INSTALLING,
            "never_stopped": NEVER_STOPPED,
        }.items():
            (root / f"{name}.py").write_text(textwrap.dedent(text))
        (root / "program_package").mkdir()
        (root / "program_package" / "__init__.py").write_text("")
        (root / "program_package" / "__main__.py").write_text(textwrap.dedent(PROGRAM))

    def run(self, *arguments: str, logdir: str = "logdir", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root if cwd is None else cwd,
            env={**os.environ, "LOGDIR": str(self.root / logdir), "FOLDER": str(self.root)},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        self.ended_at[logdir] = time.time()
        return result

    def run_ours(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "stepguard.tensorflow", *arguments, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def results(folder: Folder) -> dict[str, subprocess.CompletedProcess[str]]:
    """All that has to be a process, two at a time."""
    elsewhere = folder.root / "elsewhere"
    elsewhere.mkdir()
    with ThreadPoolExecutor(2) as pool:
        started = {
            "a file": pool.submit(
                folder.run_ours, str(folder.root / "program.py"), "--steps", "3", logdir="a file", cwd=elsewhere
            ),
            "installing": pool.submit(folder.run, "installing.py", logdir="installing"),
            "never stopped: exit": pool.submit(folder.run, "never_stopped.py", "exit", logdir="never-exit"),
            "never stopped: end": pool.submit(folder.run, "never_stopped.py", "end", logdir="never-end"),
            "a module": pool.submit(folder.run_ours, "-m", "program_package", "--steps", "3", logdir="a module"),
        }
        return {name: future.result() for name, future in started.items()}


@pytest.mark.timeout(400)
class TestAnUnchangedProgram:
    def test_runs_under_ours_from_a_file_and_ends_with_its_own_exit_code(self, results, folder):
        result = results["a file"]

        assert result.returncode == 7, result.stderr
        assert result.stdout == "done\n"
        assert max(committed(folder.root / "a file")) == 3

    def test_runs_under_ours_as_a_module_and_ends_with_its_own_traceback(self, results, folder):
        result = results["a module"]

        assert result.returncode == 1
        assert result.stdout == "done\n"
        assert result.stderr.rstrip().endswith("ZeroDivisionError: on purpose")
        assert os.path.join("program_package", "__main__.py") in result.stderr
        assert max(committed(folder.root / "a module")) == 3

    def test_has_to_be_named(self, capsys):
        assert main([]) == 2
        assert "usage" in capsys.readouterr().err
        assert main(["--help"]) == 0
        assert "usage" in capsys.readouterr().out

    def test_has_to_exist(self, capsys):
        assert main(["missing.py"]) == 2
        assert "missing.py" in capsys.readouterr().err


def test_install_from_code_replaces_theirs_and_without_version_2_it_runs(results, folder):
    assert results["installing"].returncode == 0, results["installing"].stderr
    assert max(committed(folder.root / "installing")) == 4


@pytest.mark.parametrize(("way", "code"), [("exit", 3), ("end", 0)])
class TestAProcessThatNeverStopsItsSupervisor:
    def test_ends_at_once_with_its_own_exit_code(self, way, code, results, folder):
        result = results[f"never stopped: {way}"]

        assert result.returncode == code, result.stderr
        assert folder.ended_at[f"never-{way}"] - float(result.stdout) < 60

    def test_says_nothing_of_its_threads(self, way, code, results):
        # A slow disk may have been spoken of.
        lines = [
            line for line in results[f"never stopped: {way}"].stderr.splitlines() if "a checkpoint was due" not in line
        ]

        assert lines == []

    def test_leaves_a_usable_logdir(self, way, code, results, folder, graph):
        logdir = folder.root / f"never-{way}"
        step = v1.train.get_or_create_global_step()

        with Supervisor(logdir=str(logdir)).managed_session() as session:
            assert session.run(step) >= 5

        assert not (logdir / "quarantine").exists()
