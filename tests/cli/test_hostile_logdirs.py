"""Commands on logdirs that somebody, or a disk, has prepared: they name what they cannot read, and go on."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from logdirs import commit

from stepguard.cli.main import cli
from stepguard.errors import CheckpointError
from stepguard.store import recovery, statefile
from stepguard.store.manifest import SUFFIX
from stepguard.watching import heartbeat, ledger
from stepguard.words import printable

COMMANDS = (["ls"], ["verify"], ["status"], ["prune", "--keep-last", "1", "--dry-run"])
commands = pytest.mark.parametrize("command", COMMANDS, ids=[one[0] for one in COMMANDS])


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    commit(tmp_path, 1, 2, 3, saver_files=None)
    return tmp_path


@commands
@pytest.mark.parametrize("kind", ["fifo", "zeros", "loop"])
@pytest.mark.parametrize("name", [f"model.ckpt-3{SUFFIX}", "model.ckpt-3/model.pt"])
def test_what_is_no_file_in_a_checkpoint_is_named_and_the_others_are_told(kind, name, command, logdir, stepguard):
    path = logdir / name
    path.unlink()
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero" if kind == "zeros" else path)
    result = stepguard(*command, logdir)
    assert result.exit_code in ({0, 1} if command[0] in ("ls", "status", "prune") else {1})
    assert "model.ckpt-3" in result.output
    assert "damaged" in result.output or command[0] == "prune"
    assert "model.ckpt-2" in result.output


@pytest.mark.parametrize("name", [statefile.FILE_NAME, recovery.QUARANTINE])
@pytest.mark.parametrize("command", [["ls"], ["verify"], ["prune", "--keep-last", "5", "--dry-run"]], ids=str)
def test_what_cannot_be_read_beside_the_checkpoints_is_named_and_the_exit_code_says_it(
    name, command, logdir, stepguard
):
    (logdir / name).unlink(missing_ok=True)
    os.mkfifo(logdir / name)
    result = stepguard(*command, logdir)
    assert result.exit_code == 1
    assert f"{name}: could not be read: expected a" in result.output
    assert "model.ckpt-3" in result.output


@pytest.mark.parametrize("name", [ledger.FILE_NAME, heartbeat.DIR_NAME, f"{heartbeat.DIR_NAME}/chief.json"])
def test_status_names_what_it_cannot_read(name, logdir, stepguard, document):
    (logdir / name).parent.mkdir(exist_ok=True)
    os.mkfifo(logdir / name)
    result = stepguard("status", logdir)
    assert result.exit_code == 1
    assert f"{name}: could not be read: expected a" in " ".join(result.output.split())
    assert len(document("status", logdir)["unreadable"]) == 1


@commands
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"digest": ' + b"9" * 3000 + b"}", b"\xff\xfe", b"{}"])
def test_garbage_in_any_record_is_no_traceback(content, command, logdir, stepguard):
    heartbeat.prepare(logdir)
    for name in (f"model.ckpt-3{SUFFIX}", statefile.FILE_NAME, ledger.FILE_NAME, f"{heartbeat.DIR_NAME}/chief.json"):
        (logdir / name).write_bytes(content)
    assert stepguard(*command, logdir).exit_code in (0, 1)
    json.loads(stepguard(*command, logdir, "--json").stdout)


def test_a_ledger_that_is_nested_deeper_than_a_command_can_take_apart_is_no_traceback(tmp_path, stepguard):
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    (tmp_path / ledger.FILE_NAME).write_bytes(
        b'{"event": "start", "time": 1.0, "role": "chief", "options": ' + deep + b"}\n"
        b'{"event": "warning", "time": 2.0, "role": "chief", "message": "the next line"}\n'
    )
    for options in ((), ("--json",)):
        told = stepguard("log", tmp_path, *options)
        assert (told.exit_code, told.stdout.count("the next line")) == (0, 1)
    assert stepguard("status", tmp_path, "--json").exit_code in (0, 1)


EVIL = "\x1b]0;owned\x07\x1b[2J\u202e"


def test_nothing_that_a_terminal_obeys_is_printed(tmp_path, stepguard):
    logdir = tmp_path / f"run{EVIL}"
    commit(logdir, 1, saver_files=None)
    path = logdir / f"model.ckpt-1{SUFFIX}"
    body = json.loads(path.read_bytes())
    body["digest"] = EVIL
    path.write_text(json.dumps(body))
    commit(logdir, 2, basename=f"m{EVIL}", saver_files=None)
    (logdir / statefile.FILE_NAME).write_text(f'model_checkpoint_path: "gone{EVIL}-7"\n')
    with (logdir / ledger.FILE_NAME).open("wb") as file:
        line = {"event": "stop", "time": 1.0, "pid": 1, "host": EVIL, "role": "chief", "reason": EVIL, "error": EVIL}
        file.write(json.dumps(line).encode() + b"\n")
    for command in (*COMMANDS, ["show"], ["diff", logdir], ["events"]):
        for more in ([], ["--json"]):
            result = stepguard(*command, logdir, *more)
            shown = result.output.replace("\n", "")
            assert printable(shown) == shown, command
    missing = stepguard("ls", f"{logdir}{EVIL}")
    assert missing.exit_code == 2
    assert printable(missing.output.replace("\n", "")) == missing.output.replace("\n", "")


def test_an_error_of_ours_quotes_nothing_that_a_terminal_obeys():
    error = CheckpointError(f"two\nlines of {EVIL}")
    assert str(error) == "two\nlines of \\x1b]0;owned\\x07\\x1b[2J\\u202e"


def test_a_tag_that_begins_like_a_formula_is_none_in_a_spreadsheet(tmp_path, stepguard):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    tags = ["=1+1", "+x", "-x", "@x", "loss", " =1+1", "\n@x", "\uff1d1+1", f"t{EVIL}"]
    writer = EventFileWriter(str(tmp_path))
    for tag in tags:
        writer.add_event(Event(step=1, summary=Summary(value=[Summary.Value(tag=tag, simple_value=-1.0)])))
    writer.close()
    rows = list(csv.reader(io.StringIO(stepguard("events", tmp_path, "--csv", "-").stdout)))
    expected = ["'=1+1", "'+x", "'-x", "'@x", "loss", "' =1+1", "'\\n@x", "'\uff1d1+1", printable(f"t{EVIL}")]
    assert sorted(row[0] for row in rows[1:]) == sorted(expected)
    assert {row[3] for row in rows[1:]} == {"-1.0"}


@pytest.mark.parametrize("kind", ["fifo", "zeros", "loop", "directory"])
def test_an_event_file_that_is_none_is_named_and_the_others_are_read(kind, tmp_path, stepguard, document):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path))
    writer.add_event(Event(step=1, summary=Summary(value=[Summary.Value(tag="loss", simple_value=2.0)])))
    writer.close()
    path = tmp_path / "events.out.tfevents.1"
    make = {"fifo": os.mkfifo, "directory": os.mkdir, "zeros": lambda path: path.symlink_to("/dev/zero")}
    make.get(kind, lambda path: path.symlink_to(path))(path)
    result = stepguard("events", tmp_path)
    assert result.exit_code == 1
    assert f"{path.name}: could not be read: " in result.stderr
    assert "loss" in result.stdout
    found = document("events", tmp_path)
    assert [one["tag"] for one in found["scalars"]] == ["loss"]
    assert len(found["unreadable"]) == 1


LOCAL = [["events"], ["log"], ["diff", "."], ["rollback", "--to", "1"], ["run", "--logdir"]]
OF_MIRRORS = [["ls"], ["verify"], ["status"], ["show"], ["prune", "--keep-last", "1"]]


@pytest.mark.parametrize(
    ("command", "place"),
    [
        *((one, place) for one in LOCAL for place in ("s3://bucket/run", "gs://bucket/run", "file:///tmp/run")),
        *((one, place) for one in (*LOCAL, *OF_MIRRORS) for place in ("hdfs://node/run", "s3:/b")),
    ],
    ids=lambda one: one[0] if isinstance(one, list) else one,
)
def test_a_place_in_another_store_is_refused_by_name(command, place, tmp_path, stepguard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = stepguard(*command, place, *(["--", "true"] if command[0] == "run" else []))
    assert result.exit_code == 2
    assert place in result.output.replace("\n", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [["verify"], ["ls"], ["show"]], ids=str)
def test_ctrl_c_ends_a_command_with_130(command, logdir, monkeypatch, stepguard):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert cli is not None
    monkeypatch.setattr("stepguard.store.manifest.Manifest.from_json", interrupt)
    assert stepguard(*command, logdir).exit_code == 130


def test_ctrl_c_ends_a_real_verify_with_130(tmp_path):
    commit(tmp_path, 1, saver_files=None)
    # Large enough for the signal to come while it is read.
    stage = commit(tmp_path, 2, saver_files=None).stage("model.ckpt-3")
    (stage / "model.ckpt-3").mkdir()
    with (stage / "model.ckpt-3" / "model.pt").open("wb") as file:
        file.truncate(64 << 30)
    path = tmp_path / f"model.ckpt-2{SUFFIX}"
    body = json.loads(path.read_bytes())
    del body["digest"]
    from stepguard.store import FileRecord, Manifest

    os.rename(stage / "model.ckpt-3", tmp_path / "model.ckpt-3")
    huge = Manifest("model.ckpt-3", "torch", 3, 1.0, (FileRecord("model.ckpt-3/model.pt", 64 << 30, "x"),))
    (tmp_path / f"model.ckpt-3{SUFFIX}").write_bytes(huge.to_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "stepguard", "verify", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        target = str(tmp_path / "model.ckpt-3" / "model.pt")
        deadline = time.monotonic() + 60
        while target not in _open_files(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors


def _open_files(pid: int) -> list[str]:
    found = []
    for one in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{one}"))
        except FileNotFoundError:
            continue
    return found
