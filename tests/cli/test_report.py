"""``stepguard report``: one page about a run, that opens anywhere and trusts nothing of what it shows."""

import base64
import hashlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
from html.parser import HTMLParser

import pytest

pytest.importorskip("plotly")
pytest.importorskip("tensorboard")

from logdirs import commit
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from stepguard.cli.logdir.event_files import event_files, read_curves
from stepguard.cli.reporting import gathering
from stepguard.cli.reporting.thinning import Sample, shown_of
from stepguard.watching import ledger

EVIL = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><a href=javascript:alert(3)>x</a>&lt;b&gt;\u202e"
)


class Page(HTMLParser):
    """What a browser finds in a page: its elements, its scripts, its text, and the charts by their titles."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.scripts, self.data, self.titles = [], [], {}, {}
        self.policy, self.text, self._inside = "", "", None
        self.feed(content)
        self.charts = {title: self.data[name] for name, title in self.titles.items()}

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.elements.append((tag, given))
        self._inside = (tag, given) if tag in ("script", "style") else None
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if "data-chart" in given:
            self.titles[given["data-chart"]] = given["aria-label"]

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.text += data
        elif self._inside[0] == "script" and self._inside[1].get("type") == "application/json":
            self.data[self._inside[1]["id"]] = json.loads(data)
        elif self._inside[0] == "script":
            self.scripts.append(data)


def trace_of(chart, name):
    return next(one for one in chart["data"] if one["name"] == name)


@pytest.fixture
def report(tmp_path, stepguard):
    """Write the report of a logdir, and read it. ``code`` is the exit code that is expected."""

    def written(logdir, *options, code=0):
        path = tmp_path / "report.html"
        result = stepguard("report", logdir, "-o", path, *options)
        assert result.exit_code == code, result.output
        return Page(path.read_text())

    return written


def line(event, time, pid=1, *, role="chief", **fields):
    return {"event": event, "time": float(time), "pid": pid, "host": "node1", "role": role, **fields}


def write_ledger(logdir, *lines):
    logdir.mkdir(exist_ok=True)
    (logdir / ledger.FILE_NAME).write_bytes(b"".join(map(ledger.encode, lines)))


def write_events(logdir, name, *events):
    with (logdir / f"events.out.tfevents.{name}").open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
        for tag, step, *value in events:
            event = Event(wall_time=1e9 + step, step=step)
            if tag == "start":
                event.session_log.CopyFrom(SessionLog(status=SessionLog.START))
            else:
                event.summary.CopyFrom(Summary(value=[Summary.Value(tag=tag, simple_value=value[0])]))
            records.write(event.SerializeToString())


@pytest.fixture
def crashed(tmp_path):
    """Killed at step 8, gone on with from step 5, failed at 9, gone on with to the end; with a hang and a verdict."""
    logdir = tmp_path / "digits"
    commit(logdir, 5, 12, saver_files=None)
    save = {"bytes": 1000, "secs": 0.5, "stall_secs": 0.25}
    write_ledger(
        logdir,
        line("start", 100, engine="torch", version="0.1.0", argv=["python", "train.py", "--api-key", "hunter2"]),
        line("fresh", 101, step=0, previous_step=None, previous_time=None),
        line("checkpoint", 110, name="model.ckpt-5", step=5, **save),
        line("start", 200, 2, engine="torch", version="0.1.0", argv=["python", "train.py", "--api-key", "hunter2"]),
        line("restore", 201, 2, checkpoint="model.ckpt-5", step=5, previous_step=8, previous_time=115.0, lost_steps=3),
        line("replay", 205, 2, outcome="differs", step=5, to_step=6, message="step 6 is not what it was"),
        line("hang", 206, 2, secs=60.0, stacks="stacks/chief-2.txt", ended=False),
        line("stop", 207, 2, step=9, reason="error", error="ValueError: no such digit"),
        line("start", 300, 3, engine="torch", version="0.1.0", argv=["python", "train.py", "--api-key", "hunter2"]),
        line("restore", 301, 3, checkpoint="model.ckpt-5", step=5, previous_step=9, previous_time=207.0, lost_steps=4),
        line("checkpoint", 310, 3, name="model.ckpt-12", step=12, **save),
        line("stop", 311, 3, step=12, reason="finished"),
    )
    write_events(logdir, "1", ("start", 0), *[("loss", step, 10.0 - step) for step in range(8)], ("rate", 3, 1275.6))
    write_events(logdir, "2", ("start", 5), *[("loss", step, 5.0) for step in range(5, 12)], ("loss", 12, math.nan))
    return logdir


# --- what it shows ---


def test_the_timeline_has_each_start_and_what_it_lost(crashed, report):
    page = report(crashed)
    timeline = next(iter(page.data.values()))
    steps = trace_of(timeline, "training")["y"]
    assert [list(part) for part in _parts(steps)] == [[0, 0, 5, 8], [5, 5, 9, 9], [5, 5, 12, 12, 12]]
    assert [list(part) for part in _parts(trace_of(timeline, "down, and steps lost")["y"])] == [[8, 5], [9, 5]]
    assert trace_of(timeline, "crashed or failed")["y"] == [8, 9]
    assert trace_of(timeline, "finished")["y"] == [12]
    assert trace_of(timeline, "good checkpoint")["y"] == [12, 5]
    assert "no step for 60 s" in trace_of(timeline, "a hang, or a return of the NaN guard")["text"][0]
    assert "failed: ValueError: no such digit" in page.text
    assert "ended without a word" in page.text
    assert "7steps done again" in page.text


def _parts(values):
    part = []
    for one in values:
        if one is None:
            yield part
            part = []
        else:
            part.append(one)


def test_curves_have_gaps_and_lines_where_a_start_has_gone_on(crashed, report):
    page = report(crashed)
    loss = page.charts["loss"]
    assert loss["data"][0]["x"] == list(range(13))
    assert loss["data"][0]["y"] == [10, 9, 8, 7, 6, 5, 5, 5, 5, 5, 5, 5, None]
    assert [one["x0"] for one in loss["layout"]["shapes"]] == [5, 5]
    assert "1 not finite, the first at step 12" in page.text
    assert "last 1,276 at step 3" in page.text
    assert [title for title in page.charts if title in ("loss", "rate")] == ["loss", "rate"]
    assert "rate" not in report(crashed, "--tag", "lo*").charts


def test_costs_and_verdicts_are_told(crashed, report):
    page = report(crashed)
    parts = {one["name"]: one["x"][0] for one in page.charts["Where the time went"]["data"]}
    # 14 s, 6 s and 10 s of training in 210 s; a checkpoint at 109.5 s, from which 5.5 s and 6 s were done again.
    assert sum(parts.values()) == pytest.approx(100)
    assert parts["waiting for snapshots"] == pytest.approx(100 * 0.5 / 210)
    assert parts["down"] == pytest.approx(100 * 180 / 210)
    assert "`" not in page.text
    assert page.charts["Milliseconds that training waited for a save"]["data"][0]["y"] == [250, 250]
    assert "1 differs" in page.text
    assert "step 6 is not what it was" in page.text


def test_without_event_files_the_curves_are_those_of_the_trace(torch_run, tmp_path, report):
    import torch

    for path in torch_run.iterdir():
        if "tfevents" not in path.name and path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert f"torch {torch.__version__}" in report(torch_run).text
    (tmp_path / "traces").mkdir()
    for path in (torch_run / "traces").iterdir():
        (tmp_path / "traces" / path.name).write_bytes(path.read_bytes())
    assert report(tmp_path).charts["loss"]["data"][0]["y"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_damaged_kept_and_mirrored_checkpoints_are_told_apart(crashed, report, stepguard):
    assert stepguard("keep", crashed, "5", "--name", "before").exit_code == 0
    (crashed / "model.ckpt-12" / "model.pt").write_bytes(b"short")
    copy = {"name": "model.ckpt-7", "step": 7, "time": 250.0, "bytes": 10, "engine": "torch"}
    record = {"url": "s3://user:hunter2@bucket/run", "time": 300.0, "waiting": None, "error": None}
    (crashed / "mirror.json").write_text(json.dumps({**record, "checkpoints": [copy]}))
    page = report(crashed)
    timeline = next(iter(page.data.values()))
    assert trace_of(timeline, "kept checkpoint")["y"] == [5]
    assert trace_of(timeline, "damaged checkpoint")["y"] == [12]
    assert trace_of(timeline, "checkpoint only in the mirror")["y"] == [7]
    assert "hunter2" not in page.text


def test_the_configuration_has_the_options_and_marks_what_starts_have_changed(tmp_path, report):
    given = {"saving.max_to_keep": 9, "watching.hang_secs": 60, "mirror.url": "s3://u:hunter2@bucket/run"}
    write_ledger(
        tmp_path / "run",
        line("start", 1, options={"saving.max_to_keep": 9, "saving.overhead": 0.01}),
        line("start", 2, 2, options=given),
        line("start", 3, 3),
        line("start", 4, 4, options={**given, "watching.hang_secs": 70}),
    )
    page = report(tmp_path / "run")
    # The cells of its rows, one after the other.
    assert (
        "mirror.url's3://***@bucket/run'at start 2, before: the default"
        "saving.max_to_keep9"
        "saving.overheadthe defaultat start 2, before: 0.01"
        "watching.hang_secs70at start 4, before: 60; at start 2, before: the default"
    ) in page.text
    begin = page.elements.index(("section", {"id": "configuration"}))
    assert page.elements[begin:].count(("span", {"class": "trouble"})) == 3
    write_ledger(tmp_path / "run", line("start", 1, options={}))
    assert "All have been the defaults" in report(tmp_path / "run").text
    write_ledger(tmp_path / "run", line("start", 1))
    assert "Options that" not in report(tmp_path / "run").text


# --- what it trusts ---


def test_the_page_fetches_nothing_and_its_policy_knows_its_scripts(crashed, report):
    page = report(crashed)
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in page.scripts]
    assert len(digests) == 2
    allowed = next(part for part in page.policy.split(";") if part.strip().startswith("script-src"))
    assert allowed.split()[1:] == [f"'sha256-{one}'" for one in digests]
    assert page.policy.startswith("default-src 'none';")
    assert [given for _, given in page.elements if "src" in given] == []
    assert [tag for tag, _ in page.elements if tag in ("link", "img", "iframe", "object", "base")] == []
    assert all(given["href"].startswith("#") for _, given in page.elements if "href" in given)


def test_names_and_texts_of_a_logdir_are_shown_and_not_obeyed(tmp_path, report):
    logdir = tmp_path / EVIL.replace("/", "|")
    commit(logdir, 3, basename=EVIL.replace("/", "|"), saver_files=None)
    start = line("start", 1, argv=["python", EVIL], engine=EVIL, version=EVIL, host=EVIL, options={EVIL: {EVIL: EVIL}})
    write_ledger(
        logdir,
        start,
        line("fresh", 2, step=0),
        line("warning", 3, message=EVIL),
        line("checkpoint", 3, name=EVIL, step=3),
        line("hang", 3, secs=1.0, stacks=EVIL),
        line("replay", 3, outcome=EVIL, message=EVIL, role=EVIL),
        line(EVIL, 3, **{EVIL: EVIL}),
        line("stop", 4, reason=EVIL, error=EVIL, step=3),
        line("launch", 4, role="launcher", argv=[EVIL, [EVIL]], attempt=1),
    )
    write_events(logdir, "1", (EVIL, 1, 1.0), (EVIL, 2, 2.0))
    page = report(logdir)
    assert len(page.scripts) == 2
    assert page.text.count("alert(1)") >= 10
    assert "\u202e" not in page.text
    assert [tag for tag, _ in page.elements if tag == "img"] == []
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    assert not [given for _, given in page.elements if given.get("href", "#")[0] != "#"]
    texts = [
        text for chart in page.data.values() for one in chart["data"] for text in (one["name"], *one.get("text", ()))
    ]
    assert any("alert" in text for text in texts)
    # Plotly takes these for markup of its own.
    assert not [text for text in texts if "<" in text or ">" in text]


def test_the_secrets_in_a_command_are_left_out(crashed, report):
    page = report(crashed)
    assert "train.py --api-key ***" in page.text
    assert "hunter2" not in page.text


@pytest.mark.parametrize("name", [ledger.FILE_NAME, "events.out.tfevents.3", "heartbeats", "traces"])
def test_what_cannot_be_read_is_named_and_the_rest_is_told(name, crashed, report):
    (crashed / name).unlink(missing_ok=True)
    os.mkfifo(crashed / name)
    page = report(crashed, code=1)
    assert f"{name}: could not be read" in page.text
    assert "model.ckpt-12" in page.text


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"event": "start", "time": 1e15}\n', b"\xff\xfe\n", b"{}\n"])
def test_garbage_in_any_record_is_no_traceback(content, crashed, report):
    (crashed / "heartbeats").mkdir()
    (crashed / "traces").mkdir()
    names = (ledger.FILE_NAME, "mirror.json", "heartbeats/chief.json", "traces/chief.trace", "events.out.tfevents.1")
    for name in names:
        (crashed / name).write_bytes(content)
    assert "model.ckpt-12" in report(crashed).text


# --- what it needs, and what it refuses ---


@pytest.mark.parametrize("package", ["plotly.graph_objects", "tensorboard.util.tensor_util"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(package, crashed, tmp_path, stepguard, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused = stepguard("report", crashed, "-o", tmp_path / "report.html")
    assert refused.exit_code == 3
    assert "pip install 'stepguard[report]'" in refused.stderr
    assert not (tmp_path / "report.html").exists()


def test_a_tensorboard_that_is_too_old_for_numpy_is_named_too(crashed, tmp_path, stepguard, monkeypatch):
    class TooOld:
        @staticmethod
        def find_spec(name, *_):
            if name == "tensorboard.util.tensor_util":
                raise AttributeError("`np.string_` was removed in the NumPy 2.0 release")

    monkeypatch.delitem(sys.modules, "tensorboard.util.tensor_util", raising=False)
    monkeypatch.setattr(sys, "meta_path", [TooOld, *sys.meta_path])
    refused = stepguard("report", crashed, "-o", tmp_path / "report.html")
    assert refused.exit_code == 3
    assert "np.string_" in refused.stderr
    assert "pip install 'stepguard[report]'" in refused.stderr


def test_an_address_and_an_empty_logdir_are_refused(tmp_path, stepguard):
    refused = stepguard("report", "s3://bucket/run", "-o", tmp_path / "report.html")
    assert refused.exit_code == 2
    assert "s3://bucket/run" in refused.stderr
    (tmp_path / "empty").mkdir()
    empty = stepguard("report", tmp_path / "empty", "-o", tmp_path / "report.html")
    assert (empty.exit_code, (tmp_path / "report.html").exists()) == (1, False)
    assert "nothing has run here" in empty.stderr


def test_with_a_dash_only_the_page_goes_to_stdout(crashed, stepguard):
    result = stepguard("report", crashed, "-o", "-")
    assert result.exit_code == 0
    assert result.stdout.startswith("<!doctype html>")
    assert result.stdout.rstrip().endswith("</html>")


def test_it_loads_no_framework(crashed, tmp_path):
    program = (
        "import sys\n"
        "from stepguard.cli.main import cli\n"
        f"cli(['report', {str(crashed)!r}, '-o', {str(tmp_path / 'report.html')!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'tensorflow', 'jax', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- large runs ---


def test_a_sample_is_even_and_has_the_last_item():
    few, many = Sample(10), Sample(10)
    for number in range(7):
        few.add(number)
    for number in range(1001):
        many.add(number)
    assert (few.items(), few.count) == (list(range(7)), 7)
    kept = many.items()
    assert (kept[0], kept[-1], many.count) == (0, 1000, 1001)
    assert 5 <= len(kept) <= 11
    assert len({after - before for before, after in itertools.pairwise(kept[:-1])}) == 1


def test_no_spike_and_no_gap_is_lost_from_a_curve():
    values = [math.sin(one / 500) for one in range(100_000)]
    values[12_345], values[55_555], values[77_777] = 99.0, -99.0, math.nan
    shown = shown_of(values, 1500)
    assert len(shown) <= 1502
    assert {0, 12_345, 55_555, 77_777, 99_999} <= set(shown)
    assert shown == sorted(shown)


def test_of_long_event_files_each_curve_keeps_its_share(tmp_path):
    chance = random.Random(1)
    often = [("loss", step, chance.random()) for step in range(3000)]
    seldom = [("val", step, 1.0) for step in range(0, 3000, 300)]
    write_events(tmp_path, "1", ("start", 0), *often[:2000], *seldom)
    write_events(tmp_path, "2", ("start", 2000), *often[2000:])
    curves, lost = read_curves(event_files(tmp_path).paths, most_points=200)
    loss = next(one for one in curves if one.tag == "loss")
    assert lost == 0
    assert 90 <= len(loss.steps) <= 102
    assert loss.steps[-1] == 2999
    assert (
        dict(zip(loss.steps, loss.values, strict=True)).items()
        <= {step: pytest.approx(value) for _, step, value in often}.items()
    )
    whole, _ = read_curves(event_files(tmp_path).paths, most_points=4000)
    assert len(next(one for one in whole if one.tag == "loss").steps) == 3000


def test_the_page_of_a_large_run_has_a_bound(tmp_path, report, monkeypatch):
    monkeypatch.setattr(gathering, "_EVENT_POINTS", 2000)
    logdir = tmp_path / "large"
    lines = [line("start", 1), line("fresh", 2, step=0)]
    for number in range(1, 6000):
        name = f"model.ckpt-{number}"
        lines.append(line("checkpoint", 2 + number, name=name, step=number, bytes=10, secs=0.1, stall_secs=0.01))
        lines.append(line("warning", 2 + number, message=f"warning {number}"))
    write_ledger(logdir, *lines)
    write_events(logdir, "1", *[(f"tag{step % 40}", step, 1.0) for step in range(4000)])
    page = report(logdir)
    timeline = next(iter(page.data.values()))
    assert 1000 < len(trace_of(timeline, "training")["x"]) < 2100
    assert 1000 < len(page.charts["Milliseconds that training waited for a save"]["data"][0]["x"]) < 2100
    assert "5,999saves" in page.text
    assert "warning 5999" in page.text
    assert "warning 500 " not in page.text
    assert "5,899 earlier are not shown" in page.text
    assert len([title for title in page.charts if title.startswith("tag")]) == gathering.MOST_CURVES
    assert "Not drawn, since 24 are: tag" in page.text
