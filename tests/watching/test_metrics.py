"""The metrics of a run, read by a real HTTP client."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stepguard.options import Watching
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat


def read(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.status == 200
        text = answer.read().decode()
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    assert {one.labels["role"] for one in samples} == {"chief"}
    return {one.name: one.value for one in samples}


def url_of(logdir: Path) -> str:
    beat = heartbeat.read_one(logdir, "chief")
    assert beat is not None
    assert beat.metrics_url is not None
    return beat.metrics_url


def supervisor(logdir: Path, **options: Any) -> FakeSupervisor:
    watching = Watching(metrics_port=0, **options)
    return FakeSupervisor(str(logdir), save_model_secs=0, save_model_steps=5, watching=watching)


def test_tell_of_steps_and_checkpoints(tmp_path: Path) -> None:
    sv = supervisor(tmp_path, total_steps=40)
    with sv.managed_session() as session:
        before = read(url_of(tmp_path))
        for _ in range(5):
            session.run_step()
        sv._saving.checkpointer.save_last(30)  # what the fifth step began is written now
        sv._observer._watch.meter.look()
        after = read(url_of(tmp_path))

    assert before["stepguard_step"] == 0
    assert before["stepguard_checkpoint_seconds_count"] == 0
    assert before["stepguard_save_failures_total"] == before["stepguard_restarts_total"] == 0
    assert "stepguard_seconds_since_checkpoint" not in before
    assert after["stepguard_step"] == after["stepguard_checkpoint_step"] == 5
    assert after["stepguard_total_steps"] == 40
    assert after["stepguard_steps_per_second"] > 0
    assert after["stepguard_checkpoint_seconds_count"] == after["stepguard_snapshot_stall_seconds_count"] == 1
    assert after["stepguard_checkpoint_seconds_sum"] > 0
    nbytes = sum(one.stat().st_size for one in (tmp_path / "model.ckpt-5").iterdir())
    assert after["stepguard_checkpoint_bytes"] == after["stepguard_checkpoint_written_bytes_total"] == nbytes
    assert 0 <= after["stepguard_seconds_since_checkpoint"] < 60


def test_tell_what_a_cadence_has_come_to(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    with sv.managed_session():
        before = read(url_of(tmp_path))
        sv._observer.paced(overhead=0.01, interval_secs=4.2, cost=0.0089, bytes_per_day=4.1e12)
        after = read(url_of(tmp_path))

    names = {"stepguard_checkpoint_interval_seconds", "stepguard_checkpoint_cost_ratio"}
    names.add("stepguard_checkpoint_bytes_per_day")
    assert after.keys() - before.keys() == names
    assert after["stepguard_checkpoint_interval_seconds"] == 4.2
    assert after["stepguard_checkpoint_cost_ratio"] == 0.0089
    assert after["stepguard_checkpoint_bytes_per_day"] == 4.1e12


def test_tell_of_restarts_and_of_the_checkpoint_restored(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), supervisor(tmp_path).managed_session() as session:
        for _ in range(5):
            session.run_step()
        raise ZeroDivisionError

    with supervisor(tmp_path).managed_session():
        again = read(url_of(tmp_path))

    assert again["stepguard_restarts_total"] == 1
    assert again["stepguard_step"] == again["stepguard_checkpoint_step"] == 5


def test_are_served_on_loopback_and_no_longer_than_the_run(tmp_path: Path) -> None:
    with supervisor(tmp_path).managed_session():
        url = url_of(tmp_path)
        assert url.startswith("http://127.0.0.1:")

    with pytest.raises(OSError, match="refused"):
        read(url)
    beat = heartbeat.read_one(tmp_path, "chief")
    assert beat is not None
    assert beat.metrics_url is None


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sv = FakeSupervisor(str(tmp_path), watching=Watching(metrics_port=port))
        with pytest.raises(OSError, match=f"metrics_port={port}.*choose another"):
            sv.prepare_or_wait_for_session()

    # And nothing is held by the attempt.
    with supervisor(tmp_path).managed_session():
        read(url_of(tmp_path))


def test_of_several_processes_on_a_host_the_chief_has_the_port(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with FakeSupervisor(str(tmp_path), watching=Watching(metrics_port=port)).managed_session():
        with FakeSupervisor(str(tmp_path), is_chief=False, watching=Watching(metrics_port=port)).managed_session():
            pass
        assert read(f"http://127.0.0.1:{port}/metrics")["stepguard_step"] == 0


def test_a_child_that_outlives_the_run_does_not_keep_the_port(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with supervisor(tmp_path).managed_session():
        url = url_of(tmp_path)
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # until the test is over
            os._exit(0)
    try:
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", int(url.split(":")[2].split("/")[0])))
            again.listen()
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_without_the_package_say_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    with pytest.raises(ModuleNotFoundError, match=r"stepguard\[metrics\]"):
        supervisor(tmp_path).prepare_or_wait_for_session()
