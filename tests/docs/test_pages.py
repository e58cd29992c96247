"""Every block of code of the README and the documentation is run, or is on a list with the reason why not."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from pages import ALL, ROOT, Block, blocks, is_like, is_printed

from stepguard import Guarding, Mirror, Restoring, Saving, Stopping, Watching
from stepguard.cli.main import cli
from stepguard.store import CheckpointStore
from stepguard.watching import heartbeat, ledger
from stepguard.watching.ledger import Ledger

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Two frameworks are imported, on two cores.
pytestmark = pytest.mark.timeout(500)

# What no test runs, by page and a piece of its text. Python of it is compiled all the same.
NOT_RUN = {
    ("docs/from-lightning.md", "trainer.fit("): "the gate installs no Lightning: it is what the reader comes from",
    ("docs/recipes/wandb.md", "import wandb"): "the gate has no W&B: test_recipes.py runs it with a fake one",
    ("docs/recipes/mlflow.md", "import mlflow"): "the gate has no MLflow: test_recipes.py runs it with a fake one",
    ("docs/recipes/after-commit.md", "import subprocess"): "they need a repository: test_recipes.py runs them",
    ("docs/recipes/ray.md", "from ray.train"): "the gate has no Ray: test_recipes.py runs it with a fake one",
    ("docs/from-supervisor.md", "-m package.train"): "a package of the reader's; -m is in tests/tensorflow",
}

# Programs of blocks in a shell that are not ours to check.
THEIRS = {"pkill", "docker"}


def not_run(block: Block) -> bool:
    return any(block.page == page and text in block.code for page, text in NOT_RUN)


def of(language: str) -> list[Block]:
    return [block for block in ALL if block.language == language and not not_run(block)]


# --- nothing is left out ---


def test_every_block_has_a_language_that_is_checked():
    checked = {"python", "console", "bash", "yaml", "json", "text"}
    odd = [f"{block}: {block.language or 'no language'}" for block in ALL if block.language not in checked]
    assert not odd, f"use one of {sorted(checked)}, and add a check here for others: {odd}"


def test_no_reason_for_what_is_not_run_outlives_its_block():
    for page, text in NOT_RUN:
        assert any(block.page == page and text in block.code for block in ALL), (page, text)


def test_text_is_no_code_in_disguise():
    for block in of("text"):
        assert not re.search(r"^\s*(import|from) \w+|^\$ |^(python|pip|make|stepguard) ", block.code, re.MULTILINE), (
            f"{block}: fence it with its language"
        )


def test_what_is_not_run_is_python_at_least():
    for block in ALL:
        if block.language == "python" and not_run(block):
            compile(block.code, str(block), "exec")


def environment(framework: str) -> dict[str, str]:
    """Of a program for ``framework``: those for others than TensorFlow do not find it, as TensorBoard would load it."""
    if framework == "tensorflow":
        return dict(os.environ)
    hidden = ROOT / "tests" / "torch" / "without_tensorflow"
    paths = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths}


# --- the first programs: killed, and started again ---

FIRST = {"torch": "docs/start-pytorch.md", "jax": "docs/start-jax.md", "tensorflow": "docs/start-tensorflow.md"}


# What is seen only if a heartbeat came between the last checkpoint and the kill, or if the disk is busy.
DEPENDS_ON_THE_MOMENT = (
    r"the run before had come to step \d+: \d+ steps are done again\n",
    r"; \d+ steps done again",
    r"(  warning +)?a checkpoint was due while the last one was still being written.*\n",
)


def first_program(page: str) -> Block:
    return next(block for block in ALL if block.page == page and block.title == "first.py")


def consoles(page: str) -> list[tuple[Block, str, str]]:
    """The commands of a page with a prompt, each with its output."""
    found = []
    for block in ALL:
        if block.page == page and block.language == "console":
            for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.code, re.MULTILINE):
                found.append((block, command, output))
    return found


def start(program: Path, framework: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", program.name],
        cwd=program.parent,
        env=environment(framework),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_a_checkpoint(process: subprocess.Popen[str], logdir: Path) -> None:
    """Until a step after the first is saved."""
    deadline = time.monotonic() + 150
    while not [path for path in logdir.glob("*.manifest.json") if "ckpt-0." not in path.name]:
        assert process.poll() is None, "it ended before it had saved a later step"
        assert time.monotonic() < deadline, "no checkpoint of a later step"
        time.sleep(0.02)


@pytest.fixture(scope="module", params=FIRST)
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[str]]:
    """The page, its folder, and what the first program printed when it was killed, and when it was started again."""
    page = FIRST[request.param]
    program = tmp_path_factory.mktemp("first") / "first.py"
    program.write_text(first_program(page).code)
    first = start(program, request.param)
    wait_for_a_checkpoint(first, program.parent / "runs" / "first")
    first.kill()
    printed = [first.communicate(timeout=150)[0], start(program, request.param).communicate(timeout=200)[0]]
    return page, program.parent, printed


def test_a_start_page_shows_what_one_sees(started, monkeypatch):
    page, folder, printed = started
    monkeypatch.chdir(folder)
    for block, command, output in consoles(page):
        if command == "python first.py":
            found = printed.pop(0) + ("Killed\n" if len(printed) == 1 else "")
        else:
            found = stepguard(block, command)
        for text in DEPENDS_ON_THE_MOMENT:
            found = re.sub(text, "", found)
        assert is_like(output, found), f"{block}: {command}\nexpected:\n{output}\nfound:\n{found}"
    assert not printed


def test_the_readme_has_the_first_programs():
    programs = [block.code for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert programs == [first_program(page).code for page in FIRST.values()]
    assert len(first_program(FIRST["tensorflow"]).code.strip().splitlines()) <= 15
    assert len(programs[0].strip().splitlines()) <= 18


# --- Python ---

SLOW_TO_IMPORT = {
    "tensorflow": "stepguard.tensorflow",
    # The first optimizer of a program would load `torch._dynamo`.
    "torch": "stepguard.torch,torch.utils.tensorboard,torch._dynamo",
    "jax": "stepguard.jax.supervisor,optax,orbax.checkpoint",
}


def is_first(block: Block) -> bool:
    """Whether it is one of the first programs, which have a test of their own; the README has no others."""
    return block.page == "README.md" or block.title == "first.py"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What became of each block of Python: those of a page run in one folder, in their order."""
    root = tmp_path_factory.mktemp("pages")
    processes = []
    for framework, modules in SLOW_TO_IMPORT.items():
        jobs = [world_job(framework, root / "world")] if framework in WORLD else []
        mine = (block for block in of("python") if block.framework == framework and not is_first(block))
        jobs.extend(job(block, root) for block in mine)
        path = root / f"{framework}.json"
        path.write_text(json.dumps(jobs))
        arguments = [sys.executable, "-W", "error", str(Path(__file__).with_name("run_blocks.py")), modules, path]
        processes.append(subprocess.Popen(arguments, env=environment(framework), stdout=subprocess.PIPE, text=True))
    found = {"world": {"folder": root / "world"}}
    for process in processes:
        found.update({one["name"]: one for one in json.loads(process.communicate(timeout=350)[0])})
    return found


def job(block: Block, root: Path) -> dict:
    folder = root / block.page.replace("/", "-")
    uses_the_world = "runs/digits" in block.code
    return {
        "name": str(block),
        # On the lines that it has in the page, for a traceback.
        "code": block.before + "\n" * (block.line - block.before.count("\n")) + block.code,
        "folder": str(folder),
        "copies": [(str(root / "world" / "runs" / "digits"), str(folder / "runs" / "digits"))] * uses_the_world,
    }


@pytest.mark.parametrize("block", [block for block in of("python") if not is_first(block)], ids=str)
def test_a_block_of_python_runs(ran, block):
    found = ran[str(block)]
    assert found["status"] == 0, found["err"]
    # TensorFlow has words of its own for its old ways, and a busy disk is no fault of the page.
    if "stepguard" in block.code and "disable_v2_behavior" not in block.code:
        lines = [line for line in found["err"].splitlines() if "while the last one was still being written" not in line]
        assert lines == []
    if block.output is not None:
        assert is_printed(block.output, found["out"]), f"expected:\n{block.output}\nfound:\n{found['out']}"


# --- the command line ---

# The logdirs that the pages look at, beside those that their own programs make.
WORLD = {
    "torch": """
import torch
from stepguard import Saving
from stepguard.torch import Supervisor

torch.manual_seed(1)
for name, sizes, stops in (("digits", (64, 10), (300, 350, 400, 450, 500)), ("small", (1, 8, 1), (100,))):
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    for stop in stops:
        model = torch.nn.Sequential(*layers[:-1])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        saving = Saving(save_model_secs=0, save_at_end=True)
        sv = Supervisor({"model": model, "optimizer": optimizer}, f"runs/{name}", saving=saving)
        with sv.managed_session() as sess:
            for step in sess.steps(max_steps=stop):
                inputs = torch.randn(8, sizes[0])
                loss = (model(inputs) - inputs[:, :1]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if name == "small":
                    sess.summary({"loss": loss})
""",
    "tensorflow": """
import tensorflow as tf
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1
for last in (200, 250):
    with tf.Graph().as_default():
        step = v1.train.get_or_create_global_step()
        x = v1.get_variable("x", initializer=5.0)
        for number in range(3):
            v1.get_variable(f"same{number}", initializer=1.0)
        train_op = v1.train.GradientDescentOptimizer(1e-3).minimize((x - 3.0) ** 2, global_step=step)
        sv = Supervisor(logdir="runs/graph", save_model_secs=600)
        with sv.managed_session() as sess:
            while not sv.should_stop() and sess.run(step) < last:
                sess.run(train_op)
""",
}


def world_job(framework: str, folder: Path) -> dict:
    return {"name": f"world of {framework}", "code": WORLD[framework], "folder": str(folder), "copies": []}


def damage(logdir: Path) -> None:
    """What the page on the command line shows: a bit that flipped, a file that is gone, a manifest that was cut."""
    flipped = logdir / "model.ckpt-500" / "model.pt"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (logdir / "model.ckpt-450" / "optimizer.pt").unlink()
    cut = logdir / "model.ckpt-300.manifest.json"
    cut.write_bytes(cut.read_bytes()[:100])


@pytest.mark.parametrize("page", sorted({block.page for block in of("console")} - set(FIRST.values())))
def test_a_command_shows_what_the_page_shows(ran, tmp_path, monkeypatch, page):
    shutil.copytree(ran["world"]["folder"] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    if page == "docs/cli.md":
        damage(tmp_path / "runs" / "digits")
    for block, command, output in consoles(page):
        scene = SCENES.get((page, command))
        if scene is not None:
            shutil.rmtree("runs/digits")
            scene()
        found = stepguard(block, command)
        assert is_like(output, found), f"{block}: {command}\nexpected:\n{output}\nfound:\n{found}"


def test_the_commands_of_the_shell_are_there():
    for block in of("bash"):
        if block.code.startswith("#!"):
            subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                check_command(block, words)


def check_command(block: Block, words: list[str]) -> None:
    """A command that a reader types: its program, its target, its options are there."""
    match words:
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{block}: {words}"
        case ["pip", "install", wanted]:
            name, extras = re.fullmatch(r"(\w+)\[([\w,-]+)\]", wanted).groups()
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert name == project["name"], f"{block}: {words}"
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), f"{block}: {words}"
        case ["python" | ".venv/bin/python", "-m", module, *rest]:
            assert module == "pytest" or (ROOT / "src" / module.replace(".", "/") / "__main__.py").exists(), words
            assert module != "pytest" or (ROOT / rest[0]).exists(), f"{block}: {words}"
        case ["python" | "torchrun", *rest]:
            check_program(block, next(word for word in rest if word.endswith(".py")), rest)
        case ["stepguard", *rest]:
            check_options(block, rest)
        case _:
            assert words[0] in THEIRS, f"{block}: no check for {words}"


def check_program(block: Block, name: str, words: list[str]) -> None:
    """It is in the sources, with its options, or a block of the same page."""
    if any(other.page == block.page and other.title == name for other in ALL):
        return
    path = next((path for path in (ROOT / name, ROOT / "examples" / name) if path.exists()), None)
    assert path is not None, f"{block}: no {name}"
    known = "".join(one.read_text() for one in (path, path.with_name("common.py")) if one.exists())
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert f'"{option}"' in known, f"{block}: {name} has no {option}"


def check_options(block: Block, words: list[str]) -> None:
    name, *rest = words
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"{block}: no command {name}"
    known = {option for one in command.params for option in one.opts}
    mine = rest[: rest.index("--")] if "--" in rest else rest
    assert {word.split("=")[0] for word in mine if word.startswith("-")} <= known, f"{block}: {words}"


# --- data ---


def test_yaml_and_json_can_be_read():
    for block in of("yaml"):
        assert list(yaml.safe_load_all(block.code)), block
    for block in of("json"):
        for line in block.code.splitlines():
            assert isinstance(json.loads(line), dict), block


# --- what the pages list ---


def test_each_event_of_the_ledger_and_its_fields_are_documented(ran):
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)", section("docs/files.md", "The ledger"), re.MULTILINE))
    events = appended_events()
    for line in ledger.read(ran["world"]["folder"] / "runs" / "digits"):
        events[line["event"]].update(line.keys() - {"event", "time", "pid", "host", "role"})
    for event, fields in events.items():
        assert event in rows, f"docs/files.md does not list the event {event!r}"
        missing = {field for field in fields if f"`{field}`" not in rows[event]}
        assert not missing, f"docs/files.md: the event {event!r} has the fields {missing} too"


def section(page: str, heading: str) -> str:
    return (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def appended_events() -> dict[str, set[str]]:
    """The events that the sources write, with those of their fields that are named where they are written."""
    events: dict[str, set[str]] = {"hang": {"secs", "stacks", "ended"}}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr="append" | "record" | "_begin_training"),
                    args=[ast.Constant(str(event)), *_],
                ) if node.keywords:
                    events.setdefault(event, set()).update(
                        one.arg for one in node.keywords if one.arg not in (None, "durable")
                    )
    return events


def test_the_fields_of_a_heartbeat_are_documented():
    text = section("docs/files.md", "Heartbeats")
    missing = [field.name for field in dataclasses.fields(heartbeat.Heartbeat) if f"`{field.name}`" not in text]
    assert not missing


def test_each_metric_is_documented():
    source = (ROOT / "src/stepguard/watching/metrics.py").read_text()
    names = re.findall(r'^            "(\w+)": \(', source, re.MULTILINE)
    assert len(names) > 8
    text = section("docs/watching.md", "Metrics")
    missing = [name for name in names if not re.search(f"`stepguard_{name}(_total|_count)?`", text)]
    assert not missing


def shown(default: object) -> str:
    """The default of an option as the page has it: signals by their names."""
    is_signals = isinstance(default, tuple) and default and isinstance(default[0], signal.Signals)
    return ", ".join(one.name for one in default) if is_signals else repr(default)


def test_the_page_of_options_lists_each_with_its_group_its_default_and_who_has_it_as_a_keyword():
    doors = {"TensorFlow": "stepguard.tensorflow", "PyTorch": "stepguard.torch", "JAX": "stepguard.jax"}
    flat = {
        name: inspect.signature(importlib.import_module(door).Supervisor).parameters for name, door in doors.items()
    }
    expected = []
    for group in (Saving, Stopping, Watching, Guarding, Restoring, Mirror):
        for one in dataclasses.fields(group):
            having = [name for name in doors if one.name in flat[name]]
            column = "all" if len(having) == len(doors) else ", ".join(having)
            default = "" if one.default is dataclasses.MISSING else shown(one.default)
            expected.append((group.__name__, one.name, default, column))
    found, group = [], ""
    for row in re.findall(r"^\|(.*)\|$", (ROOT / "docs/options.md").read_text(), re.MULTILINE)[2:]:
        named, option, default, _, column, _ = (cell.strip() for cell in row.split("|"))
        group = re.sub(r".*=(\w+)\(.*", r"\1", named) or group
        found.append((group, option.strip("`"), default.strip("`"), column))
    assert found == expected


def test_the_page_of_options_says_which_of_them_a_jax_program_is_refused(tmp_path):
    from stepguard.jax import Supervisor

    rows = re.findall(r"^\|(.*)\|$", (ROOT / "docs/options.md").read_text(), re.MULTILINE)[2:]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    refused = []
    for group in (Saving, Stopping, Watching, Guarding, Restoring):
        for one in dataclasses.fields(group):
            try:
                Supervisor(tmp_path / one.name, **{group.__name__.lower(): group(**{one.name: one.default})}).stop()
            except ValueError:
                refused.append(one.name)
    assert refused == [one[1].strip("`") for one in cells if "JAX" in one[5]]
    assert refused == ["frozen_apart", "peer_timeout_secs", "hyperparameters"]


def two_processes_under_a_launcher() -> None:
    """A run that lives, was killed once and failed once, and is behind what it had saved last."""
    logdir = Path("runs/digits").absolute()
    store = CheckpointStore(logdir, engine="torch")
    stage = store.stage("model.ckpt-12000")
    (stage / "model.ckpt-12000").mkdir()
    (stage / "model.ckpt-12000" / "model.pt").write_bytes(b"weights")
    store.commit("model.ckpt-12000", 12_000)
    heartbeat.prepare(logdir)
    for role in ("chief", "worker-1"):
        now = heartbeat.Heartbeat(role, engine="torch", phase="training", first_step=0, step=12_400)
        now.total_steps, now.steps_per_sec, now.boundary_time = 50_000, 35.2, time.time()
        heartbeat.write(logdir, now)
    told = {role: Ledger(logdir, role=role) for role in ("chief", "launcher")}
    for attempt, lost in ((1, None), (2, 235), (3, 75)):
        told["launcher"].append(
            "launch",
            attempt=attempt,
            argv=["train.py"],
            child_pid=os.getpid(),
            process_start=heartbeat.process_start(os.getpid()),
        )
        told["chief"].append("start", engine="torch", attempt=attempt)
        if lost is None:
            told["chief"].append("fresh", step=0)
        else:
            told["chief"].append("restore", step=275, checkpoint="model.ckpt-275", lost_steps=lost)
        if attempt < 3:
            told["chief"].append("stop", reason="error", step=350, error="ValueError: bad batch 350")
            told["launcher"].append("exit", attempt=attempt, child_pid=os.getpid(), code=1)


def a_program_that_fails_once() -> None:
    Path("train.py").write_text(FAILS_ONCE)


FAILS_ONCE = """
from pathlib import Path
from stepguard import Saving
from stepguard.testing import FakeSupervisor

is_first = not Path("runs/digits").exists()
for stop in (275, 350):
    sv = FakeSupervisor("runs/digits", saving=Saving(save_model_secs=None, save_at_end=True), save_summaries_secs=None)
    with sv.managed_session() as sess:
        while sess.step < stop:
            sess.run_step()
        if is_first and stop == 350:
            raise ValueError("bad batch 350")
"""

# What lies in runs/digits before a command of a page that shows a run at work.
SCENES = {
    ("docs/cli.md", "stepguard status runs/digits"): two_processes_under_a_launcher,
    ("docs/cli.md", "stepguard run -- python train.py --batch-size 64"): a_program_that_fails_once,
}


def stepguard(block: Block, command: str) -> str:
    """What a command prints, here. It must be possible, whatever it finds."""
    words = shlex.split(command)
    assert words[0] == "stepguard", f"{block}: nothing here runs {command!r}"
    if words[1] == "run":
        # It has signals and children of its own.
        ran = subprocess.run(
            [sys.executable, "-m", *words],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        return ran.stdout.replace(f"{Path.cwd()}/", "")
    result = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
    assert result.exit_code in (0, 1), f"{block}: {command}\n{result.output}"
    return result.output
