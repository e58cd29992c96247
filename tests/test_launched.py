"""What the launcher and its programs tell each other."""

import pytest

from stepguard import launched
from stepguard.testing import FakeSupervisor


@pytest.mark.parametrize(("given", "number"), [("3", 3), ("", None), ("x", None), ("-1", None), ("²", None)])
def test_the_number_of_the_start(monkeypatch, given, number):
    monkeypatch.setenv(launched.ATTEMPT, given)
    assert launched.attempt() == number


def test_a_run_announces_its_logdir_as_others_see_it(tmp_path, monkeypatch):
    (tmp_path / "told").mkdir()
    monkeypatch.setenv(launched.LAUNCHER_DIR, str(tmp_path / "told"))
    monkeypatch.chdir(tmp_path)
    with FakeSupervisor("run \udcff").managed_session():
        pass
    assert launched.announced(tmp_path / "told") == [tmp_path / "run \udcff"]


def test_without_a_launcher_or_with_one_that_is_gone_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.delenv(launched.LAUNCHER_DIR, raising=False)
    launched.announce(tmp_path)
    monkeypatch.setenv(launched.LAUNCHER_DIR, str(tmp_path / "gone"))
    launched.announce(tmp_path)
    assert launched.announced(tmp_path / "gone") == []
    assert list(tmp_path.iterdir()) == []
