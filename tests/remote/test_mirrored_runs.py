"""Runs with a mirror: what is in it, what a start takes from it, and what a bad network does to them."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time

import faults
import mirrors
import pytest
from mirrors import names, save_step, supervisor, train, wait_until

from stepguard.errors import CheckpointMismatchError, LogdirInUseError
from stepguard.options import Mirror
from stepguard.remote import record
from stepguard.remote.objects import RemoteError
from stepguard.store import CheckpointStore
from stepguard.testing import FakeSupervisor


def damage(path):
    content = path.read_bytes()
    path.write_bytes(b"\0" * 4 + content[4:])


def test_what_is_committed_is_in_the_mirror_at_the_end(url, tmp_path):
    train(tmp_path / "run", url, 3)

    assert names(url) == ["model.ckpt-3"]


def test_a_mirror_says_whether_something_is_on_its_way(url, tmp_path):
    sv = supervisor(tmp_path / "run", url, every=1, max_bytes_per_sec=400)
    with sv.managed_session() as session:
        mirror = sv._saving._mirror
        wait_until(lambda: not mirror.is_uploading)
        save_step(sv, session)
        wait_until(lambda: mirror.is_uploading)
        wait_until(lambda: not mirror.is_uploading)

        assert names(url) == ["model.ckpt-1"]


def test_a_new_machine_goes_on_where_the_lost_one_was(url, tmp_path):
    train(tmp_path / "run", url, 3)
    shutil.rmtree(tmp_path / "run")

    assert train(tmp_path / "elsewhere", url, 2) == 3
    assert names(url)[0] == "model.ckpt-5"


def test_the_history_is_one(url, tmp_path):
    train(tmp_path / "run", url, 3)
    before = (tmp_path / "run/run.jsonl").read_bytes()
    train(tmp_path / "elsewhere", url, 2)

    assert (tmp_path / "elsewhere/run.jsonl").read_bytes().startswith(before)
    told = [line["event"] for line in mirrors.ledger(tmp_path / "elsewhere")]
    assert [one for one in told if one != "warning"] == [
        *("start", "fresh", "checkpoint", "mirrored", "stop"),
        *("start", "restore", "checkpoint", "mirrored", "stop"),
    ]
    there = b"".join(mirrors.copies(url).remote.read("run.jsonl"))
    assert there == (tmp_path / "elsewhere/run.jsonl").read_bytes()


def test_the_first_machine_takes_what_the_second_has_done(url, tmp_path):
    train(tmp_path / "run", url, 3)
    train(tmp_path / "elsewhere", url, 2)

    assert train(tmp_path / "run", url, 1) == 5
    assert [line["step"] for line in mirrors.ledger(tmp_path / "run") if line["event"] == "restore"] == [3, 5]


def test_the_newest_is_taken_wherever_it_is(url, tmp_path):
    train(tmp_path / "run", url, 3)
    FakeSupervisor(str(tmp_path / "run"), save_model_secs=600)
    with FakeSupervisor(str(tmp_path / "run"), save_model_secs=600).managed_session() as session:
        session.run_step()

    assert train(tmp_path / "run", url, 0) == 4
    # It was not sent before, because that run had no mirror.
    assert names(url)[0] == "model.ckpt-4"


class TestDamage:
    STATE = "state.json"

    def files_of(self, root, step):
        return sorted((root / f"model.ckpt-{step}").iterdir())

    def test_here_is_repaired_from_there(self, url, tmp_path):
        train(tmp_path / "run", url, 3)
        damage(self.files_of(tmp_path / "run", 3)[0])

        assert train(tmp_path / "run", url, 0) == 3
        assert "was damaged (model.ckpt-3/" in mirrors.warnings(tmp_path / "run")
        assert not (tmp_path / "run/quarantine").exists()

    def test_of_the_manifest_here_is_repaired_from_there(self, url, tmp_path):
        train(tmp_path / "run", url, 3)
        damage(tmp_path / "run/model.ckpt-3.manifest.json")

        assert train(tmp_path / "run", url, 0) == 3

    def test_of_an_old_manifest_here_is_a_warning_and_the_mirror_goes_on(self, url, tmp_path, caplog):
        logdir = tmp_path / "run"
        train(logdir, url, 1)
        train(logdir, url, 1)
        damage(logdir / "model.ckpt-1.manifest.json")

        train(logdir, url, 1)
        assert names(url)[0] == "model.ckpt-3"
        assert "model.ckpt-1 is not compared with the one here, which is damaged" in caplog.text

    def test_there_is_repaired_from_here(self, url, tmp_path):
        train(tmp_path / "run", url, 3)
        place = mirrors.copies(url)
        key = f"model.ckpt-3/{self.files_of(tmp_path / 'run', 3)[0].name}"
        place.remote.put(key, b"?" * place.remote.head(key).size)

        train(tmp_path / "run", url, 0)
        (found,) = place.listed()
        assert place.damages(found, place.manifest(found.name), reads=True) == []
        assert "is damaged there" in mirrors.warnings(tmp_path / "run")

    def test_of_both_in_different_places_loses_nothing(self, url, tmp_path):
        logdir = tmp_path / "run"
        store = mirrors.checkpoint_in(logdir, 7, {"state.json": b"{}", "other": b"x" * 5000, "third": b"y" * 5000})
        manifest = store.read_manifest(store.candidates()[0])
        place = mirrors.copies(url)
        place.send(logdir, manifest)
        damage(logdir / "model.ckpt-7/other")
        place.remote.put("model.ckpt-7/third", b"?" * 5000)

        sv = supervisor(logdir, url)
        sv._saving.claim_logdir()
        found = sv._store.newest_good(quarantine=False, spare=sv._store.spare)
        assert found.checkpoint.name == "model.ckpt-7"
        assert found.damaged == ()
        # The uploader looked at once; what it could not repair then, the next start does.
        sv._saving.leave_mirror(5)
        sv._saving.leave_logdir()
        again = supervisor(logdir, url)
        again._saving.claim_logdir()
        wait_until(lambda: not place.damages(place.listed()[0], manifest, reads=True))
        again._saving.leave_mirror(5)
        again._saving.leave_logdir()

    def test_that_cannot_be_repaired_costs_the_steps_since_the_next_good_one_of_both(self, url, tmp_path):
        train(tmp_path / "run", url, 1)
        train(tmp_path / "run", url, 1)
        train(tmp_path / "run", url, 1)
        # Here only 1 and 3 are left, and 3 is damaged in both.
        store = CheckpointStore(tmp_path / "run", engine="fake")
        shutil.rmtree(tmp_path / "run/model.ckpt-2")
        (tmp_path / "run/model.ckpt-2.manifest.json").unlink()
        damage(self.files_of(tmp_path / "run", 3)[0])
        place = mirrors.copies(url)
        key = f"model.ckpt-3/{self.files_of(tmp_path / 'run', 3)[0].name}"
        place.remote.put(key, b"?" * place.remote.head(key).size)

        assert [one.step for one in store.candidates()] == [3, 1]
        assert train(tmp_path / "run", url, 0) == 2
        assert (tmp_path / "run/quarantine/model.ckpt-3").exists()

    def test_of_the_newest_there_costs_a_new_machine_a_step_back(self, url, tmp_path):
        train(tmp_path / "run", url, 1)
        train(tmp_path / "run", url, 1)
        place = mirrors.copies(url)
        key = next(one.key for one in place.remote.objects("model.ckpt-2/"))
        place.remote.put(key, b"?")

        assert train(tmp_path / "elsewhere", url, 0) == 1
        assert "model.ckpt-2 is damaged there" in mirrors.warnings(tmp_path / "elsewhere")


class TestRetention:
    def test_keeps_the_newest_by_its_own_number(self, url, tmp_path):
        for _ in range(4):
            train(tmp_path / "run", url, 1, keep=2)

        assert names(url) == ["model.ckpt-4", "model.ckpt-3"]
        left = {
            one.key.partition("/")[0].partition(".manifest")[0] for one in mirrors.copies(url).remote.objects("model")
        }
        assert left == {"model.ckpt-4", "model.ckpt-3"}
        assert len(list((tmp_path / "run").glob("*.manifest.json"))) == 3

    def test_never_removes_the_last_good_one(self, url, tmp_path):
        train(tmp_path / "run", url, 1, keep=1)
        train(tmp_path / "run", url, 1, keep=1)

        assert names(url) == ["model.ckpt-2"]
        found = mirrors.copies(url)
        assert found.damages(found.listed()[0], found.manifest("model.ckpt-2"), reads=True) == []


class TestInABadNetwork:
    @pytest.fixture
    def url(self, network):
        return "s3://bucket/runs/x"

    @pytest.fixture(autouse=True)
    def quick_retries(self, monkeypatch):
        from stepguard.saving import mirroring, uploader
        from stepguard.saving.retry import Backoff

        for module in (mirroring, uploader):
            monkeypatch.setattr(module, "Backoff", lambda secs: Backoff(secs, first_secs=0.05, longest_secs=0.2))

    @pytest.mark.parametrize("fault", [faults.cut, faults.broken, faults.expired])
    def test_training_goes_on_and_the_copy_follows(self, network, url, tmp_path, fault):
        sv = supervisor(tmp_path / "run", url, every=1)
        with sv.managed_session() as session:
            session.run_step()
            wait_until(lambda: names(url))
            network.fails(fault)
            for _ in range(3):
                save_step(sv, session)
            wait_until(lambda: record.read(tmp_path / "run").error)
            network.fails(None)
        assert names(url)[0] == "model.ckpt-4"
        assert "could not be" in mirrors.warnings(tmp_path / "run")

    def test_a_slow_one_skips_what_was_overtaken(self, network, url, tmp_path):
        sv = supervisor(tmp_path / "run", url, every=1)
        with sv.managed_session() as session:
            wait_until(lambda: record.read(tmp_path / "run"))
            goes_on = threading.Event()
            network.fails(faults.only("PUT", "state.json", faults.held(goes_on)))
            # All of them are committed here before one of them is there.
            for _ in range(10):
                save_step(sv, session)
            assert names(url) == []
            goes_on.set()
        assert names(url)[0] == "model.ckpt-10"
        assert len(names(url)) < 5

    def test_the_end_waits_within_its_grace_period_and_says_what_is_not_there(self, network, url, tmp_path, caplog):
        sv = supervisor(tmp_path / "run", url, grace=1)
        with sv.managed_session() as session:
            wait_until(lambda: record.read(tmp_path / "run"))
            session.run_step()
            network.fails(faults.only("PUT", "model", faults.broken))
            began = time.monotonic()
        # A network that is broken for good: without the grace period the end would wait for ever.
        assert time.monotonic() - began < 60
        assert "model.ckpt-1 is not there yet" in caplog.text
        assert "stepguard push" in caplog.text
        network.fails(None)
        train(tmp_path / "run", url, 0)
        assert names(url) == ["model.ckpt-1"]

    def test_a_try_after_a_failure_is_an_upload_again_and_the_pause_before_it_is_none(self, network, url, tmp_path):
        sv = supervisor(tmp_path / "run", url, every=1, max_bytes_per_sec=400)
        with sv.managed_session() as session:
            mirror = sv._saving._mirror
            wait_until(lambda: not mirror.is_uploading)
            network.fails(faults.only("PUT", "model", faults.expired))
            save_step(sv, session)
            wait_until(lambda: mirror._uploader.error is not None and not mirror.is_uploading)
            network.fails(None)
            wait_until(lambda: mirror.is_uploading)
        assert names(url) == ["model.ckpt-1"]

    def test_a_start_without_the_mirror_goes_on_with_the_logdir_and_says_so(self, network, url, tmp_path):
        train(tmp_path / "run", url, 3)
        network.fails(faults.broken)
        sv = supervisor(tmp_path / "run", url)
        with sv.managed_session() as session:
            assert session.step == 3
            session.run_step()
            network.fails(None)
        assert "it cannot be reached" in mirrors.warnings(tmp_path / "run")
        assert names(url)[0] == "model.ckpt-4"

    def test_a_start_without_the_mirror_and_without_a_checkpoint_is_refused(self, network, url, tmp_path, monkeypatch):
        from stepguard.saving import mirroring

        train(tmp_path / "run", url, 3)
        network.fails(faults.broken)
        sv = supervisor(tmp_path / "elsewhere", url)
        monkeypatch.setattr(sv._saving._mirror, "_start_secs", 0.2)

        with pytest.raises(RemoteError, match="s3://bucket/runs/x"), sv.managed_session():
            pass
        assert mirroring._START_SECS == 60
        network.fails(None)
        assert train(tmp_path / "elsewhere", url, 0) == 3

    def test_a_bucket_that_is_gone_is_an_error_of_the_start_and_a_warning_of_the_run(self, url, tmp_path, monkeypatch):
        train(tmp_path / "run", url, 1)
        gone = "s3://gone/runs/x"
        sv = supervisor(tmp_path / "run", gone, grace=0.5)
        with sv.managed_session() as session:
            session.run_step()
        assert "the bucket does not exist" in mirrors.warnings(tmp_path / "run")
        new = supervisor(tmp_path / "elsewhere", gone)
        monkeypatch.setattr(new._saving._mirror, "_start_secs", 0.1)
        with pytest.raises(RemoteError, match="the bucket does not exist"), new.managed_session():
            pass


class TestOneChief:
    def test_a_second_machine_is_refused_while_the_first_trains(self, url, tmp_path):
        sv = supervisor(tmp_path / "run", url, lease_secs=6)
        with sv.managed_session() as session:
            session.run_step()
            other = supervisor(tmp_path / "elsewhere", url, lease_secs=6)
            with (
                pytest.raises(LogdirInUseError, match="no other chief of this mirror") as raised,
                other.managed_session(),
            ):
                pass
            assert raised.value.pid
            # The refused one holds nothing: its logdir is free.
            CheckpointStore(tmp_path / "elsewhere").acquire().release()
        assert train(tmp_path / "elsewhere", url, 0, lease_secs=6) == 1

    def test_a_machine_that_was_taken_over_ends_and_sends_nothing_more(self, url, tmp_path):
        sv = supervisor(tmp_path / "run", url, lease_secs=0.6, every=1)
        with pytest.raises(LogdirInUseError), sv.managed_session() as session:
            save_step(sv, session)
            wait_until(lambda: names(url))
            # As when this machine was cut off for long enough.
            sv._saving._mirror._lease._end.set()
            other = supervisor(tmp_path / "elsewhere", url, lease_secs=0.6)
            with other.managed_session() as there:
                assert there.step == 1
                for _ in range(5):
                    there.run_step()
                time.sleep(0.6)  # the first has no lease any more, and its last renewal is too old for a copy
                session.run_step()
                wait_until(sv.should_stop)
        assert names(url)[0] == "model.ckpt-6"
        assert "model.ckpt-2" not in names(url)

    def test_of_two_machines_that_start_at_once_one_trains(self, url, tmp_path):
        ended, both = [], threading.Barrier(2)

        def start(name):
            sv = supervisor(tmp_path / name, url, lease_secs=6)
            both.wait()
            try:
                sv._saving.claim_logdir()
                ended.append("trains")
                both.wait()
                sv._saving.leave_mirror(5)
            except LogdirInUseError:
                ended.append("refused")
                both.wait()

        threads = [threading.Thread(target=start, args=(name,)) for name in ("one", "two")]
        for one in threads:
            one.start()
        for one in threads:
            one.join(60)

        assert sorted(ended) == ["refused", "trains"]

    def test_a_network_that_hangs_does_not_hold_the_end(self, network, tmp_path):
        sv = supervisor(tmp_path / "run", "s3://bucket/runs/x", grace=1)
        with sv.managed_session() as session:
            session.run_step()
            wait_until(lambda: record.read(tmp_path / "run"))
            goes_on = threading.Event()
            network.fails(faults.held(goes_on))
            began = time.monotonic()
        assert time.monotonic() - began < 60
        goes_on.set()

    def test_a_place_that_ignores_conditions_is_named(self, network, tmp_path, caplog):
        def unconditional(handler, body):
            for name in ("If-None-Match", "If-Match"):
                del handler.headers[name]
            return body

        network.fails(unconditional)
        train(tmp_path / "run", "s3://bucket/runs/x", 1)

        assert "it has no conditional writes" in caplog.text
        assert names("s3://bucket/runs/x") == ["model.ckpt-1"]


def test_a_thousand_checkpoints_are_mirrored(fast_path):
    tmp_path, url = fast_path, str(fast_path / "mirror")
    sv = supervisor(tmp_path / "run", url, every=1, keep=0)
    with sv.managed_session() as session:
        uploader = sv._saving._mirror._uploader
        for number in range(1, 1001):
            save_step(sv, session)
            wait_until(lambda number=number: uploader.left is None or number % 10)
    there = names(url)
    assert there[0] == "model.ckpt-1000"
    assert 100 <= len(there) <= 1000
    assert len(there) + uploader.skipped >= 999
    store = CheckpointStore(tmp_path / "mirror", engine="fake")
    assert all(store.verify(one) for one in store.candidates())


def test_the_record_in_the_logdir_says_what_is_there(url, tmp_path):
    train(tmp_path / "run", url, 3)
    found = record.read(tmp_path / "run")

    assert (found.url, found.waiting, found.error) == (url, None, None)
    assert [(one.name, one.step, one.engine) for one in found.checkpoints] == [("model.ckpt-3", 3, "fake")]


def test_a_mirror_of_another_engine_is_refused(url, tmp_path):
    store = mirrors.checkpoint_in(tmp_path / "other", 9, {"x": b"x"})
    store.engine = "torch"
    manifest = json.loads((tmp_path / "other/model.ckpt-9.manifest.json").read_text())
    assert manifest["engine"] == "fake"
    shutil.rmtree(tmp_path / "other")
    other = CheckpointStore(tmp_path / "other", engine="torch")
    stage = other.stage("model.ckpt-9")
    (stage / "model.ckpt-9").mkdir()
    (stage / "model.ckpt-9/x").write_bytes(b"x")
    made = other.commit("model.ckpt-9", 9)
    mirrors.copies(url).send(other.root, made.manifest)

    with pytest.raises(CheckpointMismatchError, match="found one of 'torch'"):
        train(tmp_path / "run", url, 1)
    assert list((tmp_path / "run").glob("model*")) == []


@pytest.mark.parametrize("place", ["run", "run/mirror"])
def test_a_mirror_inside_its_logdir_is_refused(tmp_path, place):
    with pytest.raises(ValueError, match="is in the logdir"):
        supervisor(tmp_path / "run", str(tmp_path / place))


def test_a_mirror_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a second copy of what is saved, and nothing is"):
        FakeSupervisor(None, mirror=str(tmp_path / "mirror"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": -1}, ValueError, "keep must be a number of checkpoints >= 0 or None, got -1"),
        ({"check": "some"}, ValueError, "check must be 'newest', 'all' or None, got 'some'"),
        (
            {"max_bytes_per_sec": 0},
            ValueError,
            "max_bytes_per_sec must be a number of bytes a second > 0 or None, got 0",
        ),
        ({"lease_secs": 0}, ValueError, "lease_secs must be a finite number of seconds > 0, got 0"),
        ({"store_options": "x"}, TypeError, "store_options must be a mapping"),
    ],
)
def test_a_wrong_option_is_named(options, error, message):
    with pytest.raises(error, match=message):
        Mirror("s3://bucket/x", **options)


def test_without_obstore_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    monkeypatch.setitem(__import__("sys").modules, "obstore.exceptions", None)

    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stepguard\[mirror\]'"):
        FakeSupervisor(str(tmp_path / "run"), mirror="s3://bucket/x")
    logging.getLogger(__name__).debug("nothing was made: %s", list(tmp_path.iterdir()))
    assert list(tmp_path.iterdir()) == []
