"""The files of the recipes: scripts are checked, and run under a fake scheduler; manifests keep their rules."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from pages import ALL, ROOT

from stepguard import Stopping
from stepguard.cli.launcher.launcher import CANNOT_EXECUTE, CRASH_LOOP_EXIT, NOT_FOUND, USAGE
from stepguard.cli.main import cli
from stepguard.stops import STOPPED_EXIT

RECIPES = ROOT / "examples" / "recipes"
SCRIPTS = sorted(RECIPES.glob("*.sh"))
MANIFESTS = sorted(RECIPES.glob("kubernetes_*.yaml"))
SOON_SECS = 60


def names(paths):
    return [path.name for path in paths]


def test_every_recipe_is_on_a_page():
    shown = {block.code.strip() for block in ALL}
    assert [path.name for path in RECIPES.iterdir() if path.is_file() and path.read_text().strip() not in shown] == []


# --- scripts ---


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_a_script_passes_shellcheck(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_what_a_script_starts_is_there(script):
    text = script.read_text().replace("\\\n", " ")
    for line in [line for line in text.splitlines() if "stepguard run" in line and not line.startswith("#")]:
        words = line[line.index("stepguard run") :].split()
        check_options(words[: words.index("--")])
        program = next(word for word in words if word.endswith(".py"))
        assert (ROOT / program).exists(), line
        options = [word.split("=")[0] for word in words[words.index(program) :] if word.startswith("--")]
        known = (ROOT / program).read_text()
        assert [one for one in options if f'"{one}"' not in known] == [], line


def check_options(words):
    assert words[0] == "stepguard"
    command = cli.get_command(click.Context(cli), words[1])
    known = {option for one in command.params for option in one.opts}
    assert {word.split("=")[0] for word in words[2:] if word.startswith("-")} <= known, words


def stub(place, name, script):
    path = place / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(stat.S_IRWXU)


def start(script, place, tmp_path):
    return subprocess.Popen(
        ["bash", RECIPES / script],
        cwd=tmp_path,
        env={"PATH": f"{place}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "CALLS": str(tmp_path / "calls")},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_slurms_warning_comes_to_the_launcher_and_not_to_a_shell(tmp_path):
    stub(
        tmp_path, "stepguard", 'echo "$*"; trap "echo warned; exit 138" USR1; echo ready; while :; do sleep 0.05; done'
    )
    job = start("slurm.sh", tmp_path, tmp_path)
    assert job.stdout.readline().startswith("run --requeue slurm -- python ")
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=SOON_SECS)[0] == "warned\n"
    assert job.returncode == 138


@pytest.mark.parametrize(("code", "calls"), [(75, "requeue 42\n"), (0, ""), (1, "")])
def test_a_script_of_ones_own_requeues_a_run_that_was_stopped(tmp_path, code, calls):
    stub(tmp_path, "scontrol", 'echo "$*" >> "$CALLS"')
    stub(tmp_path, "python", f'trap "sleep 0.2; exit {code}" USR1; echo ready; while :; do sleep 0.05; done')
    (tmp_path / "calls").touch()
    job = start("slurm_script.sh", tmp_path, tmp_path)
    assert job.stdout.readline() == "ready\n"
    # The program takes a moment to save its last step: the script waits for it, and not for the signal only.
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=SOON_SECS)
    assert job.returncode == code
    assert (tmp_path / "calls").read_text() == calls


# --- manifests ---


def read(name):
    return yaml.safe_load((RECIPES / name).read_text())


def pod_spec(manifest):
    spec = manifest["spec"]
    if manifest["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    return spec["template"]["spec"]


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_a_manifest_says_what_kubernetes_wants(path):
    manifest = read(path.name)
    kinds = {"Job": "batch/v1", "JobSet": "jobset.x-k8s.io/v1alpha2", "StatefulSet": "apps/v1"}
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == kinds[manifest["kind"]]
    pod = pod_spec(manifest)
    assert pod.keys() <= {"restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"}
    if manifest["kind"] != "StatefulSet":
        assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]}
    # A last save that takes as long as it may comes before SIGKILL.
    assert pod["terminationGracePeriodSeconds"] > Stopping().stop_grace_secs


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_what_a_manifest_starts_and_probes_with_is_there(path):
    (container,) = pod_spec(read(path.name))["containers"]
    if container["command"][0] == "stepguard":
        check_options(container["command"][: container["command"].index("--")])
    for name in [one for one in container if one.endswith("Probe")]:
        probe = container[name]
        assert probe.keys() <= {"exec", "initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"}
        check_options(probe["exec"]["command"])
        assert probe["exec"]["command"][-1] == _logdir(container["command"])


def _logdir(command):
    joined = " ".join(command).replace("=", " ").split()
    return joined[joined.index("--logdir") + 1]


def test_the_failure_policy_tells_the_launchers_exit_codes_apart():
    manifest = read("kubernetes_job.yaml")
    (container,) = pod_spec(manifest)["containers"]
    fails, ignored = {}, {}
    for rule in manifest["spec"]["podFailurePolicy"]["rules"]:
        assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            assert rule["onExitCodes"]["operator"] == "In"
            {"FailJob": fails, "Ignore": ignored}[rule["action"]].update(dict.fromkeys(rule["onExitCodes"]["values"]))
    assert list(fails) == [USAGE, CRASH_LOOP_EXIT, CANNOT_EXECUTE, NOT_FOUND]
    assert list(ignored) == [STOPPED_EXIT, 128 + signal.SIGTERM]


def test_the_nodes_of_a_jobset_meet_at_its_first_pod():
    manifest = read("kubernetes_jobset.yaml")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    command = pod_spec(manifest)["containers"][0]["command"]
    assert f"--nnodes={spec['parallelism']}" in command
    assert spec["parallelism"] == spec["completions"]
    host = f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['spec']['network']['subdomain']}"
    assert f"--rdzv-endpoint={host}:29500" in command
