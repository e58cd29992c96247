"""A ledger of any length: what a start and `status` read of it is bounded, and nothing is counted wrongly for that."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from stepguard.cli.logdir.run_state import read_run_state
from stepguard.options import Saving, Watching
from stepguard.testing import FakeSupervisor
from stepguard.watching import heartbeat, history, ledger
from stepguard.watching.ledger import Ledger
from stepguard.watching.redaction import without_secrets

LAST_STEP: dict[str, Any] = {"saving": Saving(save_at_end=True)}


def train(logdir: Path, steps: int) -> FakeSupervisor:
    sv = FakeSupervisor(str(logdir), save_model_secs=0, **LAST_STEP)
    with sv.managed_session() as session:
        for _ in range(steps):
            session.run_step()
    return sv


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_bytes().splitlines()]


def a_crashed_run(start: float, number: int, restarts: int) -> list[dict[str, Any]]:
    base = {"pid": 100 + number, "host": "node", "role": "chief"}
    return [
        {"event": "start", "time": start, "restarts": restarts, **base},
        {"event": "fresh" if not number else "restore", "time": start + 1, "step": 0, "lost_steps": 0, **base},
        *({"event": "checkpoint", "time": start + 2 + n, "step": n, "name": f"m-{n}", **base} for n in range(50)),
    ]


def test_a_million_lines_cost_a_start_and_status_next_to_nothing(tmp_path: Path) -> None:
    line = {"event": "checkpoint", "pid": 7, "host": "node", "role": "chief", "name": "model.ckpt-1", "step": 1}
    thousand = b"".join(ledger.encode({**line, "time": float(number)}) for number in range(1000))
    (tmp_path / ledger.FILE_NAME).write_bytes(thousand * 1000)
    assert (tmp_path / ledger.FILE_NAME).stat().st_size > 100_000_000

    began = time.process_time()
    read_run_state(tmp_path)
    status_secs = time.process_time() - began
    began = time.process_time()
    train(tmp_path, 1)
    start_secs = time.process_time() - began

    # Processor time, which a busy machine does not change much; reading all of it took 18 s.
    assert status_secs < 1.5
    assert start_secs < 3
    assert (tmp_path / ledger.FILE_NAME).stat().st_size < 1 << 20
    assert (tmp_path / "run.1.jsonl").stat().st_size > 100_000_000
    assert [one["event"] for one in ledger.read(tmp_path)][-1] == "stop"


def test_what_was_put_aside_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for limit in (1 << 20, 4000):
        logdir = tmp_path / str(limit)
        monkeypatch.setattr(ledger, "_MOST_BYTES", limit)
        for _ in range(8):
            train(logdir, 3)
            # Killed, as far as the ledger knows; the last stop tells nothing of steps that would be lost.
            path = logdir / ledger.FILE_NAME
            path.write_bytes(b"".join(one for one in path.read_bytes().splitlines(True) if b'"stop"' not in one))
            heartbeat.forget(logdir, "chief")
        assert bool(list(logdir.glob("run.*.jsonl"))) == (limit == 4000)
        found = history.from_events(ledger.read(logdir))
        sums.append((found.restarts, found.lost_steps))
        start = [one for one in ledger.read(logdir) if one["event"] == "start"][-1]
        assert start["restarts"] == found.restarts
    assert sums[0] == sums[1]
    assert sums[0][0] == 7


def test_the_sums_of_a_start_stand_for_the_lines_before_it() -> None:
    events: list[dict[str, Any]] = []
    for number in range(5):
        run = a_crashed_run(1000.0 * number, number, restarts=number)
        run[1]["so_far"] = history.totals([*events, *run[:2]])
        events += run
    whole = history.from_events(events)
    for cut in range(0, len(events) - 55, 7):
        part = history.from_events(events[cut:])
        assert part.restarts == whole.restarts, cut
        assert part.productive_secs == pytest.approx(whole.productive_secs), cut
        assert part.down_secs == pytest.approx(whole.down_secs), cut
    assert whole.productive_secs == pytest.approx(5 * 50)
    assert whole.restarts == 4


def test_a_kill_between_putting_it_aside_and_the_new_one_loses_nothing(tmp_path: Path) -> None:
    book = Ledger(tmp_path, role="chief")
    for step in range(3):
        book.append("checkpoint", step=step)
    (tmp_path / ledger.FILE_NAME).rename(tmp_path / "run.1.jsonl")
    book.append("checkpoint", step=3)
    assert [one["step"] for one in ledger.read(tmp_path)] == [0, 1, 2, 3]


def test_only_the_chief_puts_it_aside_and_begins_the_next_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_MOST_BYTES", 3000)
    worker = Ledger(tmp_path, role="worker-1")
    worker.append("start", restarts=2)
    launcher = Ledger(tmp_path, role="launcher")
    launcher.append("launch", attempt=1, argv=["train"])
    chief = Ledger(tmp_path, role="chief")
    chief.append("start", restarts=1)
    chief.append("restore", step=5, so_far={"productive_secs": 9, "replayed_secs": 1, "down_secs": 2, "lost_steps": 3})
    for step in range(40):
        worker.append("warning", message=f"slow {step}")
    assert not (tmp_path / "run.1.jsonl").exists()
    chief.append("checkpoint", step=6)
    assert (tmp_path / "run.1.jsonl").exists()
    found = ledger.read(tmp_path)
    # Of what was beyond the end that is read nothing is known any more.
    assert [(one["role"], one["event"]) for one in found][-2:] == [("chief", "checkpoint"), ("chief", "rotated")]
    assert found[-1]["archive"] == "run.1.jsonl"
    assert len(lines_of(tmp_path / "run.1.jsonl")) == 45


@pytest.mark.parametrize(
    ("line", "left"),
    [
        (b'{"event": "checkpoint", "time": 1, "step": ' + b"9" * 400 + b"}", {"event": "checkpoint", "time": 1}),
        (b'{"event": "stop", "time": 1, "step": "5", "error": 7}', {"event": "stop", "time": 1}),
        (b'{"event": "stop", "time": 1e300}', None),
        (b'{"event": "stop", "time": ' + b"1" * 400 + b"}", None),
        (b'{"event": ["stop"], "time": 1}', None),
        (b'{"event": "stop", "time": NaN}', None),
        (b'{"event": "start", "time": 1, "restarts": -1e400, "pid": 1e5}', {"event": "start", "time": 1}),
    ],
)
def test_a_field_of_another_kind_or_out_of_any_range_is_passed_over(line: bytes, left: Any, tmp_path: Path) -> None:
    (tmp_path / ledger.FILE_NAME).write_bytes(line + b"\n")
    assert ledger.read(tmp_path) == ([] if left is None else [left])
    read_run_state(tmp_path)
    train(tmp_path, 1)


@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "device"])
@pytest.mark.parametrize("name", [ledger.FILE_NAME, heartbeat.DIR_NAME, f"{heartbeat.DIR_NAME}/chief.json", "stacks"])
def test_what_is_no_file_of_ours_costs_what_it_would_have_told(
    kind: str, name: str, tmp_path: Path, caplog: Any
) -> None:
    logdir, elsewhere = tmp_path / "logdir", tmp_path / "elsewhere"
    (logdir / name).parent.mkdir(parents=True)
    elsewhere.mkdir()
    precious = elsewhere / "precious"
    precious.write_bytes(b"precious")
    path = logdir / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(elsewhere if name in (heartbeat.DIR_NAME, "stacks") else precious)
    assert not [one for one in ledger.read(logdir) + heartbeat.read(logdir) if one]
    sv = FakeSupervisor(str(logdir), save_model_secs=0, watching=Watching(hang_secs=60), **LAST_STEP)
    with sv.managed_session() as session:
        session.run_step()
    assert precious.read_bytes() == b"precious"
    assert os.listdir(elsewhere) == ["precious"]
    assert (logdir / "model.ckpt-1.manifest.json").exists()


def test_a_heartbeat_that_calls_itself_another_is_passed_over_and_nothing_outside_is_removed(tmp_path: Path) -> None:
    logdir = tmp_path / "logdir"
    heartbeat.prepare(logdir)
    (tmp_path / "precious.json").write_bytes(b"precious")
    gone = {"role": "../../precious", "phase": "stopped", "time": 1.0}
    (logdir / heartbeat.DIR_NAME / "worker-1.json").write_text(json.dumps(gone))
    heartbeat.forget_the_gone(logdir, "chief")
    assert (tmp_path / "precious.json").exists()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("train.py --api-key abc --lr 0.1", "train.py --api-key *** --lr 0.1"),
        ("train.py --password=abc", "train.py --password=***"),
        ("train.py --hf-token abc --tokenizer bert", "train.py --hf-token *** --tokenizer bert"),
        ("train.py WANDB_API_KEY=abc x=1", "train.py WANDB_API_KEY=*** x=1"),
        ("train.py wandb.token=abc", "train.py wandb.token=***"),
        ("train.py --db postgres://me:abc@host/db", "train.py --db postgres://***@host/db"),
        ("train.py --secret --flag", "train.py --secret --flag"),
        ("train.py --keys 3 --monkeys 4", "train.py --keys 3 --monkeys 4"),
        ("train.py --token -abc", "train.py --token ***"),
        ("train.py +api_key=abc ++db.password=abc", "train.py +api_key=*** ++db.password=***"),
        ("train.py --env=HF_TOKEN=abc", "train.py --env=HF_TOKEN=***"),
        ("train.py --api-keys=abc --tokens abc", "train.py --api-keys=*** --tokens ***"),
        ("train.py --max-tokens=512 --pad_token_id 0 --key_file=a.pem", None),
        (
            "train.py --secret-data=abc TOKEN1=abc --authToken=abc",
            "train.py --secret-data=*** TOKEN1=*** --authToken=***",
        ),
        ("train.py https://host/x?a=1&token=abc&b=2", "train.py https://host/x?a=1&token=***&b=2"),
        (
            "train.py me:a@bc@host //me:abc@host/x ssh://me:a/bc@host",
            "train.py ***@host //***@host/x ssh://***@host",
        ),
        ("train.py http://host:8080/a@b python:3.11@sha256:ab", None),
    ],
)
def test_the_ledger_keeps_no_secret_of_the_command_line(given: str, kept: str | None, tmp_path: Path) -> None:
    kept = kept or given
    assert without_secrets(given.split()) == kept.split()
    Ledger(tmp_path, role="launcher").append("launch", argv=given.split())
    assert ledger.read(tmp_path)[0]["argv"] == kept.split()
    assert "abc" not in (tmp_path / ledger.FILE_NAME).read_text()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("env HF_TOKEN=abc python train.py --lr 1", "env HF_TOKEN=*** python train.py --lr 1"),
        (
            "export API_KEY='a b'; python train.py --token abc && date",
            "export API_KEY=***; python train.py --token *** && date",
        ),
        ('curl -H "Authorization: Bearer abc" https://host', 'curl -H "Authorization: ***" https://host'),
        ("X-Api-Key: abc", "X-Api-Key: ***"),
        ('{"lr": 1, "password": "abc", "steps": 2}', '{"lr": 1, "password": ***, "steps": 2}'),
        ("AccountName=me;AccountKey=abc", "AccountName=me;AccountKey=***"),
        ("--password=several words", "--password=***"),
    ],
)
def test_nor_one_inside_an_argument(given: str, kept: str) -> None:
    assert without_secrets(["sh", "-c", given]) == ["sh", "-c", kept]
