"""What changes in the program's own logdir while it is proven is found, whoever has done it."""

from __future__ import annotations

from pathlib import Path

from stepguard.cli.proving.own_files import OwnFiles


def test_files_that_come_go_and_change_are_found(tmp_path: Path) -> None:
    own = tmp_path / "run"
    (own / "best").mkdir(parents=True)
    for name in ("kept", "gone", "best/changed"):
        (own / name).write_text("of the real run")
    files = OwnFiles()
    files.list_new([str(own), "gs://bucket/run"])
    assert files.changed() == []

    (own / "gone").unlink()
    (own / "come").write_text("of the trial")
    (own / "best" / "changed").write_text("of the trial, it is")
    files.list_new([str(own)])

    assert files.changed() == [str(own / name) for name in ("best/changed", "come", "gone")]
