"""Every benchmark runs, in its smallest size, and uses nothing of the package that is not public."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SOURCE = BENCHMARKS.parent / "src"
sys.path.insert(0, str(BENCHMARKS))

from run import SMALLEST  # noqa: E402

SHARED = {"run", "common"}


def test_all_of_them_are_known_to_the_runner() -> None:
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - SHARED == set(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs(name: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.md"
    command = [sys.executable, str(BENCHMARKS / "run.py"), name, "--smallest", "--out", str(out)]
    command += ["--json", str(tmp_path / "figures.json")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"benchmarks/{name}.py" in out.read_text()
    assert "Commit" in out.read_text()
    measured = json.loads((tmp_path / "figures.json").read_text())["benchmarks"][name]
    assert measured["command"].startswith(f"python benchmarks/{name}.py")
    assert measured["output"]
    # The benchmark of replicas prints lines.
    assert measured["tables"] or name == "replicas"
    for table in measured["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_it_uses_public_names_only(path: Path) -> None:
    private = [
        f"{path.name}:{node.lineno}: {node.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        # Its own.
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os"))
    ]
    assert not private


def test_an_unknown_name_is_refused_before_anything_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nothing" in done.stderr
