"""The commands on checkpoints of JAX, which are read without JAX."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from logdirs import flip


def by_name(found):
    return {one["name"]: one for one in found}


def test_names_are_those_of_error_messages_and_values_are_shown_when_asked_for(jax_run, document):
    found = document("show", jax_run, "--all")
    tensors = by_name(found["tensors"])
    assert {"params[0]", "kinds.half", "key"} <= set(tensors)
    eighth = tensors["kinds.eighth"]
    assert (eighth["dtype"], eighth["bytes"], eighth["min"], eighth["max"]) == ("float8_e4m3fn", 2, -1.0, 0.5)
    values = {one["name"]: (one["type"], one["value"]) for one in found["values"]}
    assert (values["kinds.patience"], values["kinds.word"]) == (("int", 3), ("str", "same"))
    assert values["process-0.global_step"] == ("int", 4)


def test_two_steps_differ_in_what_was_trained(jax_run, document):
    changes = by_name(document("diff", jax_run / "model.ckpt-2", jax_run / "model.ckpt-4")["changes"])
    assert (changes["params[0]"]["kind"], changes["params[0]"]["difference"]["absolute"]) == ("values", 2)
    assert not any(name.startswith("kinds") for name in changes)


def test_ls_and_verify_know_them(jax_run, document, stepguard, tmp_path):
    assert [(one["step"], one["engine"], one["state"]) for one in document("ls", jax_run)["checkpoints"]] == [
        *((4, "jax", "good"), (2, "jax", "good"))
    ]
    assert stepguard("verify", jax_run).exit_code == 0
    assert "jax" in stepguard("status", jax_run).stdout


def test_a_damaged_one_is_found(jax_run, stepguard, tmp_path):
    shutil.copytree(jax_run, tmp_path / "run")
    flip(tmp_path / "run" / "model.ckpt-4" / "d" / "process-0")
    verified = stepguard("verify", tmp_path / "run")
    assert verified.exit_code == 1
    assert "d/process-0" in verified.stdout


@pytest.mark.parametrize("command", ["show", "diff"])
def test_jax_is_not_loaded(command, jax_run):
    program = (
        "import sys\nfrom stepguard.cli.main import cli\n"
        "try:\n    cli(sys.argv[1:])\nfinally:\n    assert not {'jax', 'tensorstore', 'orbax'} & set(sys.modules)\n"
    )
    paths = [str(jax_run / "model.ckpt-2"), str(jax_run / "model.ckpt-4")][: 1 + (command == "diff")]
    done = subprocess.run([sys.executable, "-c", program, command, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == (command == "diff"), done.stderr
    assert "params[0]" in done.stdout


def test_one_without_a_manifest_is_shown_as_such(jax_run, document, tmp_path):
    shutil.copytree(jax_run / "model.ckpt-4", tmp_path / "copy")
    found = document("show", tmp_path / "copy")
    assert (found["engine"], found["state"]) == ("jax", "incomplete")
    assert by_name(found["tensors"])["params[0]"]["max"] == 4


def test_what_orbax_has_written_is_shown(stepguard, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    ocp.PyTreeCheckpointer().save(tmp_path / "it", {"params": [np.arange(3.0)], "n": 7})
    shown = stepguard("show", tmp_path / "it", "--all")
    assert shown.exit_code == 0
    assert "params[0]" in shown.stdout
