"""The files of the recipes: scripts are checked, and run under a fake scheduler; manifests keep their rules."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import signal
import stat
import subprocess
import sys
import types
import urllib.request
from pathlib import Path

import click
import pytest
import yaml
from pages import ALL, ROOT

from stepguard import Saving, Stopping
from stepguard.cli.launcher.launcher import CANNOT_EXECUTE, CRASH_LOOP_EXIT, NOT_FOUND, USAGE
from stepguard.cli.main import cli
from stepguard.stops import STOPPED_EXIT
from stepguard.watching import ledger
from stepguard.watching.heartbeat import Heartbeat
from stepguard.watching.metrics import MetricsServer, Totals

RECIPES = ROOT / "examples" / "recipes"
SCRIPTS = sorted(RECIPES.glob("*.sh"))
MANIFESTS = sorted(RECIPES.glob("kubernetes_*.yaml"))
SOON_SECS = 60


def names(paths):
    return [path.name for path in paths]


def test_every_recipe_is_on_a_page():
    shown = {block.code.strip() for block in ALL}
    # A dashboard is imported, not read.
    files = [path for path in RECIPES.iterdir() if path.is_file() and path.suffix != ".json"]
    assert [path.name for path in files if path.read_text().strip() not in shown] == []


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


# --- containers, dashboards, other trackers ---


def test_the_containers_run_what_is_there():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line.split()[0] for line in lines if line and line[0] not in "# "] == [
        *("FROM", "WORKDIR", "COPY", "COPY", "ARG", "RUN", "COPY", "RUN", "USER", "WORKDIR", "VOLUME", "CMD")
    ]
    copied = [words for line in lines if line.startswith("COPY ") for words in line.split()[1:-1]]
    assert [one for one in copied if not (ROOT / one).exists()] == []
    command = json.loads(next(line for line in lines if line.startswith("CMD "))[4:])
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    train = services["train"]
    check_options(train["command"][: train["command"].index("--")])
    check_options(train["healthcheck"]["test"][1:])
    assert int(train["stop_grace_period"].removesuffix("s")) > Stopping().stop_grace_secs
    for words in (command, train["command"]):
        program = next(word for word in words if word.endswith(".py"))
        assert (ROOT / program.removeprefix("/stepguard/")).exists()
        given = [word.split("=")[0] for word in words[words.index(program) :] if word.startswith("--")]
        known = (ROOT / program.removeprefix("/stepguard/")).read_text()
        assert [one for one in given if f'"{one}"' not in known] == []


def test_the_dashboard_shows_the_metrics_of_a_run_by_run_and_host():
    now = Heartbeat("chief", step=7, steps_per_sec=2.0, total_steps=9, replay={"outcome": "same"})
    now.last_checkpoint = {"name": "model.ckpt-5", "step": 5, "time": 0.0, "bytes": 10, "secs": 1.0, "stall_secs": 0.1}
    server = MetricsServer(now, Totals(), host="127.0.0.1", port=0, run="/runs/digits")
    try:
        with urllib.request.urlopen(server.url) as answer:
            served = answer.read().decode()
    finally:
        server.close()
    assert f'stepguard_step{{host="{now.host}",role="chief",run="/runs/digits"}} 7.0' in served
    dashboard = json.loads((RECIPES / "grafana_dashboard.json").read_text())
    assert [one["name"] for one in dashboard["templating"]["list"]] == ["datasource", "run", "host"]
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for expression in shown:
        assert '{run=~"$run", host=~"$host"}' in expression
        for name in re.findall(r"stepguard_\w+", expression):
            assert re.search(rf"^{name}{{", served, re.MULTILINE), name
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(shown)


class _Tracker:
    """What the writers of recipes use of `wandb` and of `mlflow`, which are not installed here."""

    def __init__(self):
        self.calls = []
        self.info = types.SimpleNamespace(run_id="id of mlflow", experiment_id="1")

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            return None if name == "get_experiment_by_name" else self

        return call


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandbWriter"), ("mlflow", "MLflowWriter")])
def test_all_starts_of_a_run_are_one_run_of_the_tracker(tmp_path, monkeypatch, name, kind):
    tracker = _Tracker()
    fake = types.ModuleType(name)
    fake.init = tracker.init
    fake.MlflowClient = lambda: tracker
    monkeypatch.setitem(sys.modules, name, fake)
    writer = runpy.run_path(str(RECIPES / f"{name}_writer.py"))[kind]
    for _ in range(2):
        one = writer(tmp_path / "run")
        one.add_scalar("loss", 0.5, 7)
        one.flush()
        one.close()
    said = [(called, named.get("id") or arguments) for called, arguments, named in tracker.calls]
    if name == "wandb":
        first, second = (given for called, given in said if called == "init")
        assert first == second == (tmp_path / "run" / "wandb_id.txt").read_text()
        assert [given for called, given in said if called == "log"] == [({"loss": 0.5, "step": 7},)] * 2
    else:
        assert [called for called, _ in said].count("create_run") == 1
        assert [given for called, given in said if called == "log_metric"] == [("id of mlflow", "loss", 0.5)] * 2


# --- after a commit ---


@pytest.fixture
def committed(tmp_path):
    """What `on_commit` is given: a checkpoint of a small model."""
    torch = pytest.importorskip("torch")
    from stepguard.torch import Supervisor

    seen = []
    saving = Saving(save_model_secs=0, save_at_end=True, on_commit=seen.append)
    with Supervisor({"model": torch.nn.Linear(2, 1)}, tmp_path / "run", saving=saving).managed_session() as sess:
        for _ in sess.steps(max_steps=3):
            sess.metrics({"val_loss": 0.5})
    return seen[-1]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The file in which a fake `dvc` notes its calls; `stepguard` is the one under test."""
    place = tmp_path / "bin"
    place.mkdir()
    stub(place, "stepguard", f'exec "{sys.executable}" -c "from stepguard.cli.main import main; main()" "$@"')
    stub(place, "dvc", f'echo "$*" >> "{tmp_path / "calls"}"')
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    return tmp_path / "calls"


def run_recipe(name):
    return runpy.run_path(str(RECIPES / f"{name}.py"))


def weights_in(path):
    from safetensors.torch import load_file

    return {name: tuple(one.shape) for name, one in load_file(path).items()}


def test_each_commit_is_one_of_the_hub(committed, commands, monkeypatch):
    pushed = []

    class Api:
        def create_repo(self, repository, *, exist_ok, private):
            pushed.append((repository, exist_ok, private))

        def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, commit_message):
            pushed.append((repo_id, weights_in(path_or_fileobj), path_in_repo, commit_message))

    fake = types.ModuleType("huggingface_hub")
    fake.HfApi = Api
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    run_recipe("push_to_hub")["PushToHub"]("someone/digits", private=True)(committed)
    shapes = {"weight": (1, 2), "bias": (1,)}
    assert pushed == [("someone/digits", True, True), ("someone/digits", shapes, "model.safetensors", "step 3")]


def test_the_hub_has_what_the_recipe_calls():
    hub = pytest.importorskip("huggingface_hub")
    inspect.signature(hub.HfApi.create_repo).bind(None, "someone/digits", exist_ok=True, private=True)
    inspect.signature(hub.HfApi.upload_file).bind(
        None, repo_id="someone/digits", path_or_fileobj="x", path_in_repo="x", commit_message="step 3"
    )


def test_an_evaluation_gets_the_checkpoint_and_its_failure_is_an_error(committed, tmp_path):
    program = tmp_path / "evaluate.py"
    program.write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).write_text(repr(sys.argv[2:]))")
    evaluation = run_recipe("evaluate_on_commit")["evaluation"]
    evaluation(sys.executable, str(program), str(tmp_path / "seen"))(committed)
    assert (tmp_path / "seen").read_text() == repr(["--checkpoint", str(committed.path), "--step", "3"])
    with pytest.raises(subprocess.CalledProcessError):
        evaluation(sys.executable, "-c", "raise SystemExit(1)")(committed)


def test_dvc_has_the_newest_weights(committed, commands, tmp_path):
    out = tmp_path / "models" / "digits.safetensors"
    add = run_recipe("dvc_on_commit")["dvc_add"](str(out))
    add(committed)
    add(committed)
    assert weights_in(out) == {"weight": (1, 2), "bias": (1,)}
    assert commands.read_text() == f"add {out}\npush {out}\n" * 2


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandbWriter"), ("mlflow", "MLflowWriter")])
def test_a_checkpoint_is_an_artifact_of_the_tracker(committed, tmp_path, monkeypatch, name, kind):
    tracker = _Tracker()
    tracker.id = "id of wandb"
    fake = types.ModuleType(name)
    fake.init, fake.Artifact, fake.MlflowClient = tracker.init, tracker.Artifact, lambda: tracker
    monkeypatch.setitem(sys.modules, name, fake)
    run_recipe(f"{name}_writer")[kind](tmp_path / "tracked").keep(committed)
    said = {called: (arguments, named) for called, arguments, named in tracker.calls}
    if name == "wandb":
        metadata = {"step": 3, "val_loss": 0.5}
        assert said["Artifact"] == (("checkpoint-id of wandb",), {"type": "model", "metadata": metadata})
        assert said["add_dir"] == ((str(committed.path),), {})
        assert said["log_artifact"] == ((tracker,), {"aliases": ["latest", "step-3"]})
        assert "wait" in said
    else:
        assert said["log_artifacts"][0] == ("id of mlflow", str(committed.path), "checkpoints/model.ckpt-3")


_RAY = """
import tempfile
import torch
from types import SimpleNamespace as ScalingConfig, SimpleNamespace as RunConfig, SimpleNamespace as FailureConfig


class TorchTrainer:
    # What Ray does in each process, of which there is one here.
    def __init__(self, train, *, train_loop_config, scaling_config, run_config):
        self.train, self.config = train, train_loop_config

    def fit(self):
        place = tempfile.mktemp()
        torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
        self.train(self.config)
        torch.distributed.destroy_process_group()


def prepare_model(model):
    return torch.nn.parallel.DistributedDataParallel(model)
"""


def test_the_program_for_ray_goes_on_where_it_was(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "ray" / "train").mkdir(parents=True)
    (tmp_path / "ray" / "__init__.py").touch()
    for name in ("__init__.py", "torch.py"):
        # Where this is imported, `torch` is PyTorch: imports are absolute.
        (tmp_path / "ray" / "train" / name).write_text(_RAY)
    (tmp_path / "tensorflow.py").write_text("raise ImportError('hidden by a test')")
    place = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for steps in (30, 50):
        command = [sys.executable, RECIPES / "ray_train.py", "--logdir", tmp_path / "run", f"--steps={steps}"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": place}, timeout=200)
    events = [(one["event"], one.get("step")) for one in ledger.read(tmp_path / "run")]
    assert ("restore", 30) in events
    assert events[-1] == ("stop", 50)
