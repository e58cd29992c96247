"""``stepguard show`` and ``stepguard diff`` on checkpoints of both engines."""

import shutil
import subprocess
import sys
from collections import Counter

import pytest
from logdirs import commit

from stepguard.store import tensorflow_files


def by_name(found):
    return {one["name"]: one for one in found}


KINDS = {
    "half": ("bfloat16", -2.5, 1.5, -0.5),
    "flags": ("bool", 0, 1, 0.5),
    "wave": ("complex64", 5.0, 5.0, 5.0),
    "nothing": ("float32", None, None, None),
    "broken": ("float32", "-inf", 1.0, "-inf"),
}


@pytest.mark.parametrize(("engine", "prefix"), [("tensorflow", ""), ("torch", "kinds."), ("jax", "kinds.")])
def test_tensors_of_all_kinds_are_shown(engine, prefix, request, stepguard, document):
    logdir = request.getfixturevalue(f"{engine}_run")
    shown = stepguard("show", logdir / "model.ckpt-4")
    assert shown.exit_code == 0
    assert shown.stdout.startswith(f"{logdir / 'model.ckpt-4'}: step 4, {engine}, good\n")
    found = document("show", logdir / "model.ckpt-4")
    assert (found["step"], found["engine"], found["state"]) == (4, engine, "good")
    tensors = by_name(found["tensors"])
    for name, (dtype, low, high, mean) in KINDS.items():
        one = tensors[prefix + name]
        assert (one["dtype"], one["min"], one["max"], one["mean"]) == (dtype, low, high, mean), name
        assert prefix + name in shown.stdout
    assert tensors[prefix + "half"]["bytes"] == 4
    assert tensors[prefix + "nothing"]["shape"] == [0, 3]
    broken = tensors[prefix + "broken"]
    assert (broken["nan"], broken["inf"]) == (1, 1)


def test_strings_of_tensorflow_have_no_numbers(tensorflow_run, document):
    words = by_name(document("show", tensorflow_run)["tensors"])["words"]
    assert (words["dtype"], words["shape"], words["bytes"], words["min"]) == ("string", [2], None, None)


def test_names_of_pytorch_are_those_of_error_messages_and_values_are_shown_when_asked_for(
    torch_run, stepguard, document
):
    found = document("show", torch_run, "--all")
    assert {"model.weight", "model.bias", "process-0.random.torch"} <= set(by_name(found["tensors"]))
    values = {one["name"]: (one["type"], one["value"]) for one in found["values"]}
    assert values["kinds.patience"] == ("int", 3)
    assert values["kinds.word"] == ("str", "same")
    assert values["process-0.global_step"] == ("int", 4)
    kind, numbers = values["process-0.random.python[1]"]
    assert (kind, len(numbers)) == ("tuple", 625)
    assert "values" not in document("show", torch_run)
    assert "625 numbers" in stepguard("show", torch_run, "--all").stdout
    assert "--all shows them" in stepguard("show", torch_run).stdout


def test_a_logdir_stands_for_the_one_that_a_restart_would_take(torch_run, tmp_path, stepguard, document):
    assert document("show", torch_run)["checkpoint"] == str(torch_run / "model.ckpt-4")
    nothing = stepguard("show", tmp_path)
    assert nothing.exit_code == 2
    assert "found none that a restart could take" in nothing.stderr


@pytest.mark.parametrize("engine", ["tensorflow", "torch", "jax"])
def test_a_checkpoint_equals_itself(engine, request, stepguard, document):
    logdir = request.getfixturevalue(f"{engine}_run")
    same = stepguard("diff", logdir, logdir / "model.ckpt-4")
    assert same.exit_code == 0
    assert same.stdout.startswith("equal: ")
    assert document("diff", logdir, logdir)["changes"] == []
    assert document("diff", logdir, logdir)["equal"] >= len(KINDS)


@pytest.mark.parametrize(("engine", "step_name"), [("tensorflow", "global_step"), ("torch", "process-0.global_step")])
def test_the_step_differs_between_two_checkpoints_of_a_run(engine, step_name, request, stepguard, document):
    logdir = request.getfixturevalue(f"{engine}_run")
    pair = (logdir / "model.ckpt-2", logdir / "model.ckpt-4")
    assert stepguard("diff", *pair).exit_code == 1
    changes = by_name(document("diff", *pair)["changes"])
    step = changes.pop(step_name)
    assert (step["kind"], step["a"], step["b"]) == ("values", "2", "4")
    assert (step["difference"]["absolute"], step["difference"]["relative"]) == (2, 0.5)
    # What is NaN in both is equal.
    assert not any("broken" in name or "half" in name for name in changes)


def test_a_single_file_of_a_checkpoint_is_shown_without_a_state(torch_run, stepguard, document):
    path = torch_run / "model.ckpt-4" / "model.pt"
    shown = stepguard("show", path)
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[0] == f"{path}: no step, torch"
    assert "never" not in shown.stdout
    found = document("show", path)
    assert (found["state"], sorted(by_name(found["tensors"]))) == (None, ["bias", "weight"])
    assert document("show", torch_run / "model.ckpt-4")["state"] == "good"


@pytest.fixture
def saved(tmp_path):
    """Write a state with torch.save, and return the file."""
    torch = pytest.importorskip("torch")

    def save(name, state):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


def test_each_kind_of_difference_is_told(saved, stepguard, document):
    import torch

    ones = torch.ones(2, 3)
    one = saved("a.pt", {"gone": ones, "shape": ones, "dtype": ones, "value": ones, "same": ones, "word": "x"})
    other = saved(
        "b.pt",
        {"new": ones, "shape": ones[0], "dtype": ones.int(), "value": ones * 1.5, "same": ones, "word": "y"},
    )
    found = document("diff", one, other)
    assert found["equal"] == 1
    changes = by_name(found["changes"])
    assert {name: (change["kind"], change["a"], change["b"]) for name, change in changes.items()} == {
        "gone": ("only in A", "float32 2x3", None),
        "new": ("only in B", None, "float32 2x3"),
        "shape": ("shape", "2x3", "3"),
        "dtype": ("dtype", "float32", "int32"),
        "value": ("values", None, None),
        "word": ("values", "x", "y"),
    }
    assert changes["value"]["difference"] == {
        "changed": 6,
        "count": 6,
        "absolute": 0.5,
        "relative": pytest.approx(1 / 3),
    }
    assert stepguard("diff", one, other).stdout.splitlines()[-1] == "6 differences, 1 equal"


def test_a_count_is_shown_and_compared_like_a_dictionary(saved, document):
    one = saved("a.pt", {"milestones": Counter([2, 4, 4])})
    other = saved("b.pt", {"milestones": Counter([2, 4])})
    shown = {name: value["value"] for name, value in by_name(document("show", one, "--all")["values"]).items()}
    assert shown == {"milestones.2": 1, "milestones.4": 2}
    assert list(by_name(document("diff", one, other)["changes"])) == ["milestones.4"]


def test_a_file_that_only_code_could_read_is_refused_and_no_code_is_run(saved, tmp_path, stepguard):
    path = saved("evil.pt", {"model": Evil(str(tmp_path / "was-run"))})
    refused = stepguard("show", path)
    assert refused.exit_code == 3
    assert "without running code from it" in refused.stderr
    assert not (tmp_path / "was-run").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_file_that_is_cut_short_is_a_finding(saved, stepguard):
    import torch

    path = saved("cut.pt", {"model": torch.ones(1000)})
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:length])
        broken = stepguard("show", path)
        assert broken.exit_code == 1, (length, broken.output)
        assert f"{path}: expected a file that torch.save wrote" in broken.stderr


def test_a_tensor_that_tensorflow_cannot_read_is_a_finding(tensorflow_run, tmp_path, stepguard):
    logdir = tmp_path / "copy"
    shutil.copytree(tensorflow_run, logdir)
    data = logdir / "model.ckpt-4.data-00000-of-00001"
    data.write_bytes(bytes(len(data.read_bytes())))
    broken = stepguard("show", logdir / "model.ckpt-4")
    assert broken.exit_code == 1
    assert str(logdir / "model.ckpt-4") in broken.stderr
    assert "Traceback" not in broken.stderr


def test_what_is_in_no_form_that_is_known_is_refused_with_the_reason(tmp_path, stepguard):
    pytest.importorskip("torch")
    commit(tmp_path, 1, saver_files=None)
    (tmp_path / "model.ckpt-1" / "model.pt").unlink()
    (tmp_path / "model.ckpt-1" / "model.pt").mkdir()
    refused = stepguard("show", tmp_path / "model.ckpt-1")
    assert refused.exit_code == 3
    assert "found a directory" in refused.stderr


@pytest.mark.parametrize("engine", ["tensorflow", "torch"])
def test_without_the_framework_the_error_says_what_to_install(engine, tmp_path, stepguard, monkeypatch):
    commit(tmp_path, 1, saver_files=None if engine == "torch" else tensorflow_files)
    monkeypatch.setitem(sys.modules, f"stepguard.{engine}.checkpoint.tensors", None)  # its import fails now
    refused = stepguard("show", tmp_path)
    assert refused.exit_code == 3
    assert f"pip install 'stepguard[{engine}]'" in refused.stderr


@pytest.mark.parametrize("command", [["show", "run"], ["export", "run/model.ckpt-1", "weights.pt", "--weights"]])
@pytest.mark.parametrize("version", ["2.7.1", None])
def test_an_old_or_missing_framework_ends_a_command_in_one_line(command, version, tmp_path):
    commit(tmp_path / "run", 1, saver_files=None)
    (tmp_path / "torch").mkdir()
    text = "raise ModuleNotFoundError(name='torch')" if version is None else f"__version__ = {version!r}"
    (tmp_path / "torch" / "__init__.py").write_text(text)
    refused = subprocess.run(
        # The working directory is the first place of imports.
        [sys.executable, "-m", "stepguard", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 3
    (line,) = refused.stderr.splitlines()
    assert ("found 2.7.1: pip install --upgrade" in line) == (version is not None)
    assert "'stepguard[torch]'" in line


def test_an_engine_that_is_not_known_is_an_error(tmp_path, stepguard):
    from stepguard.store import CheckpointStore

    store = CheckpointStore(tmp_path, engine="abacus")
    (store.stage("model.ckpt-1") / "model.ckpt-1.beads").write_bytes(b"ooo")
    store.commit("model.ckpt-1", 1)
    refused = stepguard("show", tmp_path)
    assert refused.exit_code == 3
    assert "'abacus'" in refused.stderr


@pytest.mark.parametrize("is_manifest_damaged", [False, True])
def test_a_checkpoint_whose_directory_is_gone_is_a_finding(is_manifest_damaged, tmp_path, stepguard):
    pytest.importorskip("torch")
    commit(tmp_path, 1, saver_files=None)
    path = tmp_path / "model.ckpt-1"
    shutil.rmtree(path)
    if is_manifest_damaged:
        (tmp_path / "model.ckpt-1.manifest.json").write_bytes(b"{")
    for arguments in (("show", path), ("diff", path, path)):
        refused = stepguard(*arguments)
        assert refused.exit_code == 1
        assert "expected a manifest" in refused.stderr if is_manifest_damaged else "found none" in refused.stderr
        assert f"`stepguard verify {path}` says more" in refused.stderr
