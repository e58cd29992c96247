"""The servers that the test run forks its processes from."""

from __future__ import annotations

from pathlib import Path

from forks import Forks, run_program


def test_each_has_imported_what_it_was_told_to_and_not_what_another_was_and_has_frozen_it(tmp_path: Path) -> None:
    modules = ["colorsys", "wave"]
    program = tmp_path / "program.py"
    program.write_text(
        f"import gc, sys; print(*(one for one in {modules} if one in sys.modules), gc.get_freeze_count() > 0)"
    )
    for module in modules:
        process = Forks([module]).start(run_program, str(tmp_path / module), [str(program)])
        process.join(60)
        assert process.exitcode == 0

    assert [(tmp_path / module).read_text() for module in modules] == [f"{module} True\n" for module in modules]
