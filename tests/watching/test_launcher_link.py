"""What the launcher and its programs tell each other."""

import pytest

from stepguard.testing import FakeSupervisor
from stepguard.watching import launcher_link


@pytest.mark.parametrize(("given", "number"), [("3", 3), ("", None), ("x", None), ("-1", None), ("²", None)])
def test_the_number_of_the_start(monkeypatch, given, number):
    monkeypatch.setenv(launcher_link.ATTEMPT, given)
    assert launcher_link.attempt() == number


def test_a_run_announces_its_logdir_as_others_see_it(tmp_path, monkeypatch):
    (tmp_path / "told").mkdir()
    monkeypatch.setenv(launcher_link.LAUNCHER_DIR, str(tmp_path / "told"))
    monkeypatch.chdir(tmp_path)
    with FakeSupervisor("run \udcff").managed_session():
        pass
    assert launcher_link.announced(tmp_path / "told") == [tmp_path / "run \udcff"]


def test_without_a_launcher_or_with_one_that_is_gone_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.delenv(launcher_link.LAUNCHER_DIR, raising=False)
    launcher_link.announce(tmp_path)
    monkeypatch.setenv(launcher_link.LAUNCHER_DIR, str(tmp_path / "gone"))
    launcher_link.announce(tmp_path)
    assert launcher_link.announced(tmp_path / "gone") == []
    assert list(tmp_path.iterdir()) == []
