"""``stepguard events``: the scalars that TensorBoard shows, as a table, a plot, CSV and a picture."""

import csv
import io
import json
import math
import subprocess
import sys

import pytest

pytest.importorskip("tensorboard")

# As the command does: the package is not to load TensorFlow.
from stepguard.cli.logdir.event_files import event_files, read_curves
from stepguard.cli.text.plot import plotted


def write(logdir, name, *events):
    """Write an event file: ("start", step), or (tag, step, value)."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    path = logdir / f"events.out.tfevents.{name}"
    with path.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
        for time, (tag, step, *value) in enumerate(events):
            event = Event(wall_time=100.0 + time, step=step)
            if tag == "start":
                event.session_log.CopyFrom(SessionLog(status=SessionLog.START))
            else:
                event.summary.CopyFrom(Summary(value=[Summary.Value(tag=tag, simple_value=value[0])]))
            records.write(event.SerializeToString())
    return path


@pytest.fixture
def restarted(tmp_path):
    """Killed after step 4, and gone on with from step 3, where the loss then was another."""
    write(tmp_path, "1", ("start", 0), *[("loss", step, 10.0 - step) for step in range(5)])
    write(tmp_path, "2", ("start", 3), *[("loss", step, 5.0 - step) for step in range(3, 6)], ("rate", 5, 7.0))
    return tmp_path


def test_what_a_killed_run_wrote_for_later_steps_is_left_out(restarted, document):
    loss, rate = document("events", restarted)["scalars"]
    assert [curve.steps for curve in read_curves(event_files(restarted).paths, ["loss"])[0]] == [(0, 1, 2, 3, 4, 5)]
    assert [curve.values for curve in read_curves(event_files(restarted).paths, ["loss"])[0]] == [
        (10.0, 9.0, 8.0, 2.0, 1.0, 0.0)
    ]
    assert (loss["tag"], loss["count"], loss["first_step"], loss["last_step"]) == ("loss", 6, 0, 5)
    assert (loss["last"], loss["min"], loss["max"], loss["not_finite"]) == (0.0, 0.0, 10.0, 0)
    assert (rate["tag"], rate["last"]) == ("rate", 7.0)


def test_a_file_is_read_up_to_a_record_that_is_cut_short(restarted, document):
    path = restarted / "events.out.tfevents.2"
    path.write_bytes(path.read_bytes()[:-3])
    assert [one["tag"] for one in document("events", restarted)["scalars"]] == ["loss"]
    (restarted / "events.out.tfevents.3").write_bytes(b"")
    assert document("events", restarted)["scalars"][0]["count"] == 6


def test_crafted_records_are_passed_over_and_counted(tmp_path, stepguard, document):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    write(tmp_path, "1", ("start", 0), ("loss", 1, 2.0))
    with (tmp_path / "events.out.tfevents.2").open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
        records.write(b"\xff no event")
        for sizes, dtype in (((1 << 40,), 1), ((3,), 1), ((), 21), ((-1,), 1)):
            value = Summary.Value(tag="loss")
            value.metadata.plugin_data.plugin_name = "scalars"
            value.tensor.dtype = dtype
            value.tensor.float_val.append(1.0)
            for size in sizes:
                value.tensor.tensor_shape.dim.add(size=size)
            records.write(Event(wall_time=2.0, step=2, summary=Summary(value=[value])).SerializeToString())
    write(tmp_path, "3", ("loss", 3, 1.0))
    result = stepguard("events", tmp_path)
    assert result.exit_code == 1
    assert "1 record of its event files cannot be read" in result.stderr
    [loss] = document("events", tmp_path)["scalars"]
    assert (loss["count"], loss["first_step"], loss["last_step"]) == (2, 1, 3)


def test_values_that_are_not_finite_are_counted_and_told_apart(tmp_path, stepguard, document):
    write(tmp_path, "1", ("loss", 1, 2.0), ("loss", 2, math.inf), ("loss", 3, math.nan))
    [loss] = document("events", tmp_path)["scalars"]
    assert (loss["last"], loss["min"], loss["max"], loss["not_finite"]) == ("nan", 2.0, 2.0, 2)
    assert stepguard("events", tmp_path, "--plot").exit_code == 0


def test_tags_are_chosen_by_patterns(restarted, document):
    assert [one["tag"] for one in document("events", restarted, "--tag", "l*")["scalars"]] == ["loss"]
    assert [one["tag"] for one in document("events", restarted, "--tag", "rate", "--tag", "loss")["scalars"]] == [
        "loss",
        "rate",
    ]
    assert document("events", restarted, "--tag", "nothing")["scalars"] == []


def test_all_values_are_written_as_csv(restarted, tmp_path, stepguard):
    table = tmp_path / "scalars.csv"
    shown = stepguard("events", restarted, "--tag", "loss", "--csv", table)
    assert "TAG" in shown.stdout
    rows = list(csv.reader(io.StringIO(table.read_text())))
    assert rows[0] == ["tag", "step", "wall_time", "value"]
    assert [(row[0], int(row[1]), float(row[3])) for row in rows[1:]] == [
        ("loss", step, value) for step, value in enumerate([10.0, 9.0, 8.0, 2.0, 1.0, 0.0])
    ]
    assert stepguard("events", restarted, "--tag", "loss", "--csv", "-").stdout == table.read_text()


def test_a_picture_is_drawn(restarted, tmp_path, stepguard):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scalars.png"
    assert stepguard("events", restarted, "--png", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [("--csv", "-", "--json"), ("--png", "-", "--json"), ("--csv", "-", "--png", "-")])
def test_only_one_document_goes_to_stdout(options, restarted, stepguard):
    refused = stepguard("events", restarted, *options)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert " and ".join(one for one in ("--csv -", "--png -", "--json") if one.split()[0] in options) in refused.stderr


def test_without_matplotlib_the_error_says_what_to_install(restarted, tmp_path, stepguard, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = stepguard("events", restarted, "--png", tmp_path / "scalars.png")
    assert refused.exit_code == 3
    assert "pip install 'stepguard[plots]'" in refused.stderr


def test_without_tensorboard_the_error_says_what_to_install(restarted, stepguard, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.util.tensor_util", None)
    refused = stepguard("events", restarted)
    assert refused.exit_code == 3
    assert "pip install 'stepguard[events]'" in refused.stderr


def test_no_event_files_are_no_error_and_those_of_a_directory_below_are_named(restarted, stepguard):
    empty = restarted / "empty"
    empty.mkdir()
    shown = stepguard("events", empty)
    assert (shown.exit_code, shown.stdout) == (0, f"{empty}: no event files\n")
    (restarted / "events.out.tfevents.1").rename(empty / "events.out.tfevents.1")
    (restarted / "events.out.tfevents.2").unlink()
    assert f"there are some in {empty}" in stepguard("events", restarted).stdout


@pytest.mark.parametrize("engine", ["tensorflow", "torch"])
def test_real_event_files_are_read_without_a_framework(engine, request):
    logdir = request.getfixturevalue(f"{engine}_run")
    program = (
        "import json, sys\n"
        "from stepguard.cli.main import cli\n"
        f"cli(['events', {str(logdir)!r}, '--json'], standalone_mode=False)\n"
        "assert not {'tensorflow', 'torch', 'keras'} & set(sys.modules), 'a framework was loaded'\n"
    )
    read = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    tags = {one["tag"]: one["count"] for one in json.loads(read.stdout)["scalars"]}
    if engine == "torch":
        assert tags["loss"] == 4


def test_a_curve_goes_from_its_first_value_down_to_its_last():
    picture = plotted("loss", [0, 1, 2, 3], [3.0, 2.0, 1.0, 0.0], width=40, height=4).splitlines()
    assert picture[0].strip() == "loss"
    assert len(picture) == 4 + 3
    assert picture[1].startswith("3 ┤⠉")
    assert picture[4].startswith("0 ┤")
    assert picture[4].rstrip()[-1] != " "
    assert len(picture[4]) == 40
    assert picture[-1].split() == ["0", "3"]
    assert max(map(len, picture)) == 40


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [math.nan, 1.0, math.nan, 2.0], [-1e308, 1e308], [math.nan], [math.inf, 1.0]], ids=str
)
def test_any_curve_can_be_drawn(values):
    picture = plotted("any", list(range(len(values))), values, width=30, height=3)
    dots = sum("\u2800" < character <= "\u28ff" for character in picture)
    assert dots > 0 or "no finite value" in picture
