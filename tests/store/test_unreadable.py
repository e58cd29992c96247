"""A real start in a process to which the system refuses one file; tests/soak/unreadable.py does it for hours."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[1] / "soak" / "unreadable.py"


@pytest.fixture(scope="module")
def soak() -> Any:
    spec = importlib.util.spec_from_file_location("soak_unreadable", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(soak: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not there")
    found: Path = soak.compiled(tmp_path_factory.mktemp("library"))
    return found


@pytest.mark.parametrize(
    ("name", "error", "changes"),
    [
        ("model.ckpt-6.manifest.json", "EBADMSG", True),
        ("model.ckpt-6", "EUCLEAN", True),
        ("model.ckpt-6/state.json", "EACCES", False),
        ("checkpoint", "ESTALE", True),
        ("run.jsonl", "EIO", False),
    ],
)
def test_a_start_goes_back_a_step_or_does_without(
    name: str, error: str, changes: bool, soak: Any, library: Path, tmp_path: Path
) -> None:
    assert soak.attack(library, tmp_path / "logdir", name, error, changes=changes) is None
