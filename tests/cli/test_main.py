"""The frame of the command: help, exit codes, errors in one line, and what it loads."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from logdirs import commit

from stepguard.cli.main import cli
from stepguard.store.manifest import Manifest

FRAMEWORKS = {"tensorflow", "keras", "torch", "jax", "flax", "numpy", "google", "tensorboard", "matplotlib"}


def run(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=False)


def commands():
    return cli.list_commands(None)


def test_help_documents_the_exit_codes_and_names_every_command():
    shown = run("--help")
    assert shown.exit_code == 0
    assert "Exit codes" in shown.output
    for name in commands():
        assert f"\n  {name} " in shown.output


@pytest.mark.parametrize("name", commands())
def test_the_help_of_every_command_has_examples(name):
    shown = run(name, "--help")
    assert shown.exit_code == 0
    assert f"stepguard {name} " in shown.output.split("Examples:")[1]


@pytest.mark.parametrize("arguments", [[], *([name, "--help"] for name in commands())], ids=str)
def test_no_framework_and_no_numpy_is_loaded_by_help(arguments):
    program = (
        "import json, sys\n"
        "from stepguard.cli.main import cli\n"
        f"cli({[*arguments, '--help']!r}, standalone_mode=False)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(found.stdout.splitlines()[-1]))
    assert "stepguard.cli.main" in loaded
    assert loaded & FRAMEWORKS == set()


def test_a_mistake_in_the_arguments_ends_with_2(tmp_path):
    (tmp_path / "file").touch()
    assert run("no-such-command").exit_code == 2
    assert "did you mean '--version'" in run("version").stderr
    assert "did you mean '--help'" in run("help").stderr
    assert run("ls").exit_code == 2
    assert run("ls", tmp_path / "missing").exit_code == 2
    assert run("ls", tmp_path / "file").exit_code == 2


def numbers_of_commands():
    context = click.Context(cli)
    for name in cli.list_commands(context):
        for option in cli.get_command(context, name).params:
            if isinstance(option.type, click.types.FloatParamType):
                yield name, option.opts[0]


@pytest.mark.parametrize(("command", "option"), list(numbers_of_commands()))
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e999"])
def test_a_number_that_is_none_is_a_mistake(command, option, value):
    refused = run(command, option, value, "--", "true")
    assert refused.exit_code == 2
    assert f"Invalid value for '{option}'" in refused.stderr
    assert value == "-1" or "expected a finite number of seconds" in refused.stderr


@pytest.mark.parametrize("name", commands())
def test_every_command_that_ctrl_c_ends_exits_with_130_and_one_line(name, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.get_command(click.Context(cli), name), "invoke", interrupted)
    two = {name: [".", "."] for name in ("diff", "pull", "push")}
    marks = {"keep": [".", "best"], "unkeep": [".", "best"], "rollback": [".", "--to", "1"], "export": [".", "x.pt"]}
    marks["report"] = [".", "-o", "-"]
    ending = run(name, *{**two, **marks, "run": ["true"]}.get(name, ["."]))
    assert (ending.exit_code, ending.stderr) == (130, "stepguard: interrupted\n")


def test_verify_that_ctrl_c_ends_in_the_middle_of_a_file_exits_with_130_and_one_line(tmp_path):
    commit(tmp_path, 1, saver_files=None)
    weights = tmp_path / "model.ckpt-1" / "model.pt"
    # So large that nothing reads it to its end; it takes no room on the disk.
    os.truncate(weights, 1 << 42)
    manifest = tmp_path / "model.ckpt-1.manifest.json"
    record = Manifest.from_json(manifest.read_bytes(), manifest)
    (one,) = record.files
    manifest.write_bytes(replace(record, files=(replace(one, size=1 << 42),)).to_json())
    verifying = subprocess.Popen(
        [sys.executable, "-m", "stepguard", "verify", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60.0
        while not any(os.path.realpath(one) == str(weights) for one in Path(f"/proc/{verifying.pid}/fd").iterdir()):
            assert verifying.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        verifying.send_signal(signal.SIGINT)
        assert verifying.communicate(timeout=60.0) == ("", "stepguard: interrupted\n")
        assert verifying.returncode == 130
    finally:
        verifying.kill()
        verifying.communicate()


def test_the_module_is_the_command():
    ended = subprocess.run([sys.executable, "-m", "stepguard", "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("stepguard 0.")


@pytest.mark.parametrize(
    ("words", "found"), [("ver", "verify"), ("run --req", "--requeue"), ("status --pr", "--probe")]
)
def test_a_shell_completes_commands_and_options(words, found):
    completion = ShellComplete(cli, {}, "stepguard", "_STEPGUARD_COMPLETE")
    *before, incomplete = words.split()
    assert [one.value for one in completion.get_completions(before, incomplete)] == [found]
