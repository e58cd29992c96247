"""The servers that the test run forks its processes from."""

from __future__ import annotations

import sys
from pathlib import Path

from forks import Forks


def _note_imported(path: Path, names: list[str]) -> None:
    path.write_text(" ".join(name for name in names if name in sys.modules))


def test_each_has_imported_what_it_was_told_to_and_not_what_another_was(tmp_path: Path) -> None:
    modules = ["colorsys", "wave"]
    for module in modules:
        process = Forks([module]).start(_note_imported, tmp_path / module, modules)
        process.join(60)
        assert process.exitcode == 0

    assert [(tmp_path / module).read_text() for module in modules] == modules
