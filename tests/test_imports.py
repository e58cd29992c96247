"""What an import costs: `import stepguard` must stay cheap in every process, whatever is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FRAMEWORKS = {"tensorflow", "keras", "torch", "jax", "flax", "numpy", "google", "obstore"}


def modules_after(statement: str) -> set[str]:
    """Return the names of all modules that a new interpreter holds after ``statement``."""
    program = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout.splitlines()[-1]))


CORE = [
    "coordination.coordinator",
    "engine",
    "errors",
    "frameworks",
    "disk",
    "watching.hang_monitor",
    "watching.hang_watch",
    "watching.heartbeat",
    "watching.history",
    "watching.launcher_link",
    "watching.ledger",
    "watching.trial",
    "coordination.looper",
    "managed_session",
    "watching.metrics",
    "saving.adoption",
    "saving.checkpointer",
    "saving.commit",
    "saving.nan_guard",
    "watching.hang_report",
    "watching.observer",
    "watching.part",
    "watching.pulse",
    "watching.run_record",
    "watching.step_meter",
    "words",
    "options",
    "watching.progress_line",
    "saving.retry",
    "saving.mirroring",
    "saving.uploader",
    "remote.copies",
    "remote.history",
    "remote.lease",
    "remote.opening",
    "saving.run_saver",
    "coordination.services",
    "coordination.signals",
    "steps.boundary",
    "steps.chief",
    "steps.common_store",
    "steps.engine",
    "steps.part_messages",
    "steps.feeds",
    "steps.gate",
    "steps.interrupts",
    "steps.member",
    "steps.peers",
    "steps.process_state",
    "steps.random_streams",
    "steps.rendezvous",
    "steps.session",
    "steps.values",
    "steps.word_log",
    "steps.worker",
    "store",
    "supervisor",
    "store.saved_tensor",
    "saving.way_back",
    "saving.writer",
]


@pytest.mark.parametrize("module", ["stepguard", *(f"stepguard.{name}" for name in CORE), "stepguard.cli.main"])
def test_no_framework_and_no_numpy_is_loaded_by(module):
    loaded = modules_after(f"import {module}")
    assert module in loaded
    assert loaded & FRAMEWORKS == set()


def test_no_engine_is_loaded_by_stepguard_itself():
    engines = {"stepguard.tensorflow", "stepguard.cli", "stepguard.torch", "stepguard.testing"}
    assert modules_after("import stepguard") & engines == set()


def imported(framework: str, version: str | None, folder: Path) -> list[str]:
    """The lines of an import of the Supervisor where the framework says that version, or, with ``None``, is missing."""
    (folder / framework).mkdir()
    broken = f"raise ModuleNotFoundError(name={framework!r})"
    text = broken if version is None else f"__version__ = {version!r}"
    (folder / framework / "__init__.py").write_text(text)
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); from stepguard.{framework} import Supervisor"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    return ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("framework", "version", "said"),
    [
        ("torch", "2.7.1+cpu", "PyTorch 2.8 or newer, found 2.7.1+cpu"),
        ("jax", "0.9.12", "JAX 0.10 or newer, found 0.9.12"),
        (
            "tensorflow",
            "2.15.1",
            "TensorFlow 2.16 or newer, found 2.15.1",
        ),
    ],
)
def test_a_framework_that_is_too_old_is_named_with_what_is_needed(framework, version, said, tmp_path):
    what_to_do = f"pip install --upgrade 'stepguard[{framework}]'"
    assert (
        imported(framework, version, tmp_path)[-1] == f"ImportError: stepguard.{framework} needs {said}: {what_to_do}"
    )


@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_without_its_framework_an_engine_says_what_to_install(framework, tmp_path):
    assert imported(framework, None, tmp_path)[-1].endswith(f"found none: pip install 'stepguard[{framework}]'")


@pytest.mark.parametrize("version", ["2.8.0", "2.8.0a0+git1", "2.10.1", "3.0", "main"])
def test_a_framework_that_is_new_enough_is_taken(version, tmp_path):
    # What is missing then is what the real one has.
    assert "needs PyTorch" not in imported("torch", version, tmp_path)[-1]


def test_the_lowest_versions_are_those_of_the_distribution():
    from stepguard.frameworks import LOWEST

    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    for package, (_, *lowest) in LOWEST.items():
        assert f"{package}>={'.'.join(map(str, lowest))}" in extras[package]


@pytest.mark.parametrize("extra", ["tensorflow", "tensorflow-cpu", "torch", "events", "report"])
def test_whoever_installs_an_engine_can_read_its_events(extra):
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    assert any(one.startswith("tensorboard>=") for one in extras[extra]), extras[extra]


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    import stepguard

    assert stepguard.__version__ == version("stepguard")
