"""Records of a logdir with a wrong value in one place: every command and every start ends, and with a sentence."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crafted import variants
from test_damaged_manifests import body_of, signed

from stepguard.errors import StepguardError
from stepguard.options import Mirror, Saving
from stepguard.remote.lease import KEY, Lease
from stepguard.remote.opening import open_remote
from stepguard.store.manifest import SUFFIX
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat, ledger, requests
from stepguard.words import printable


def train(logdir: Path, steps: int, **options: Any) -> None:
    saving = Saving(save_model_steps=1, save_at_end=True, max_to_keep=3, keep_best=("loss", "min", 1))
    sv = FakeSupervisor(str(logdir), save_model_secs=0, saving=saving, mirror=Mirror(f"{logdir}.mirror"), **options)
    with sv.managed_session() as session:
        for _ in range(steps):
            session.run_step()
            sv.metrics(session, {"loss": 1 / session.step})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logdir and its mirror, with all records but requests and a rollback."""
    logdir = tmp_path_factory.mktemp("original") / "run"
    train(logdir, 3)
    train(logdir, 3)
    return logdir


@pytest.fixture
def logdir(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(f"{original}.mirror", tmp_path / "run.mirror")
    return shutil.copytree(original, tmp_path / "run")


def calls(logdir: Path, stepguard: Callable[..., Any]) -> list[Callable[[], object]]:
    """Ways to read everything. None of them changes what is read but the last one, which is made in a copy."""

    def command(*arguments: object) -> Callable[[], object]:
        def call() -> None:
            done = stepguard(*arguments)
            assert done.exit_code in (0, 1, 2, 3), arguments
            shown = done.output.replace("\n", "")
            assert printable(shown) == shown, arguments

        return call

    def start() -> None:
        place = logdir.with_name("copy")
        shutil.copytree(logdir, place)
        shutil.copytree(f"{logdir}.mirror", f"{place}.mirror")
        try:
            with contextlib.suppress(StepguardError):
                train(place, 1)
        finally:
            shutil.rmtree(place)
            shutil.rmtree(f"{place}.mirror")

    url = f"file://{logdir}.mirror"
    return [
        start,
        *(command(name, logdir) for name in ("ls", "status", "log", "verify", "best", "stop", "save")),
        *(command(name, logdir, "--json") for name in ("ls", "status", "log")),
        *(command(name, url) for name in ("ls", "status", "verify")),
        command("prune", logdir, "--keep-last", "1", "--dry-run"),
        command("report", logdir, "-o", logdir.with_name("page.html")),
        command("push", logdir, f"file://{logdir}.pushed"),
        command("pull", url, logdir.with_name("pulled")),
    ]


def check(
    logdir: Path, stepguard: Callable[..., Any], document: Any, write: Callable[[Any], object], most: int = 100
) -> None:
    found = list(variants(document))
    chosen = random.Random(len(found)).sample(found, min(most, len(found)))
    for (what, variant), call in zip(chosen, itertools.cycle(calls(logdir, stepguard)), strict=False):
        write(variant)
        try:
            call()
        except BaseException as error:
            raise AssertionError(what) from error


@pytest.mark.parametrize("place", ["run", "run.mirror"])
def test_a_manifest_with_any_wrong_value(place, logdir, stepguard):
    path = logdir.with_name(place) / f"model.ckpt-6{SUFFIX}"
    body = body_of(path)

    def write(variant: Any) -> None:
        if isinstance(variant, dict):
            try:
                signed(path, variant)
                return
            except RecursionError:
                pass
        path.write_text(json.dumps(variant))

    check(logdir, stepguard, {**body, "names": ["paper"], "kept": True}, write)


def test_a_ledger_with_any_wrong_value_in_a_line(logdir, stepguard):
    path = logdir / ledger.FILE_NAME
    lines = path.read_bytes().splitlines()
    kinds = {json.loads(line)["event"]: json.loads(line) for line in lines}

    def write(variant: Any) -> None:
        path.write_bytes(b"\n".join([*lines, *(json.dumps(one).encode() for one in variant.values())]) + b"\n")

    for event, line in kinds.items():
        check(logdir, stepguard, {event: line}, lambda one: write(one) if isinstance(one, dict) else None, 25)


def test_a_heartbeat_with_any_wrong_value(logdir, stepguard):
    path = logdir / heartbeat.DIR_NAME / "chief.json"
    document = json.loads(path.read_bytes())
    last = {"name": "model.ckpt-6", "step": 6, "time": 1.0, "bytes": 1, "secs": 0.1, "stall_secs": 0.1}
    cadence = {"overhead": 0.01, "interval_secs": 1.0, "cost": 0.01, "bytes_per_day": 1.0}
    document |= {"last_checkpoint": last, "cadence": cadence, "phase": "training"}
    check(logdir, stepguard, document, lambda one: path.write_text(json.dumps(one)))


@pytest.mark.parametrize("name", ["mirror.json", "rollback.json"])
def test_another_record_with_any_wrong_value(name, logdir, stepguard):
    path = logdir / name
    if name == "rollback.json":
        assert stepguard("rollback", logdir, "--to", "5").exit_code == 0
    document = json.loads(path.read_bytes())
    check(logdir, stepguard, document, lambda one: path.write_text(json.dumps(one)))


def test_a_lease_with_any_wrong_value_is_taken_over(tmp_path):
    remote = open_remote(str(tmp_path / "mirror"))
    first = Lease(remote, tmp_path, lease_secs=60, on_lost=lambda _: None)
    first.acquire()
    first.release()
    path = tmp_path / "mirror" / KEY
    for what, variant in variants(json.loads(path.read_bytes())):
        path.write_text(json.dumps(variant))
        other = Lease(remote, tmp_path / "other", lease_secs=0.01, on_lost=lambda _: None)
        assert other.acquire(), what
        other.release()


def test_a_request_with_any_wrong_value_is_removed_and_does_nothing(tmp_path):
    now, asked = heartbeat.Heartbeat("chief"), []
    reception = requests.Reception(tmp_path, now, lambda one: asked.append(one) or requests.Answer(True, ""))
    document = {"verb": "stop", "name": "x", "step": 7, "pid": now.pid, "process_start": now.process_start}
    path = tmp_path / requests.DIR_NAME / f"{'0' * 16}.json"
    path.parent.mkdir()
    for what, variant in variants({**document, "host": now.host}):
        path.write_text(json.dumps(variant))
        reception.look()
        assert not path.exists(), what
    verbs = {one.verb for one in asked}
    assert all(isinstance(one, str) for one in verbs)
