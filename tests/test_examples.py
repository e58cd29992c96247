"""Every example is run as a user runs it: as a process of its own, twice where the second run is to resume.

The first of them, and the demo, start an interpreter; the others are forked from one that has imported TensorFlow.
"""

import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "process"))

from forks import Forks, run_program  # noqa: E402

EXAMPLES = ROOT / "examples"


# Run by tests/replicas/test_example.py.
CLUSTERS = {"replicas.py", "demo_replicas.py"}


FORKS = Forks(["tensorflow", "stepguard.tensorflow"])


def run(program, *arguments: str) -> str:
    """Run ``program`` to its end, which must be a good one, and return all that it printed."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(program), *arguments],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    return well_printed(ended.returncode, ended.stdout)


def fork(program, *arguments: str) -> str:
    """As ``run``, without the start of an interpreter."""
    with tempfile.NamedTemporaryFile("r") as output:
        process = FORKS.start(run_program, output.name, [str(program), *arguments], True)
        process.join(250)
        return well_printed(process.exitcode, output.read())


def well_printed(code: int | None, printed: str) -> str:
    assert code == 0, printed
    for noise in ("Traceback", "WARNING", "ERROR"):
        assert noise not in printed, printed
    return printed


def accuracy(printed: str) -> float:
    return float(re.findall(r"test accuracy ([\d.]+)%", printed)[-1]) / 100


def saved_steps(logdir: Path, basename: str = "model.ckpt") -> set[int]:
    return {int(path.stem.rsplit("-", 1)[1]) for path in logdir.glob(f"{basename}-*.index")}


def scalars(logdir: Path) -> dict[str, dict[int, float]]:
    """Return the values of every scalar summary in the event files of ``logdir``, by tag and step."""
    import tensorflow as tf

    values: dict[str, dict[int, float]] = {}
    for path in logdir.glob("events.out.tfevents.*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                values.setdefault(value.tag, {})[event.step] = value.simple_value
    return values


def test_every_example_is_tested():
    helpers = {"digits_data", "digits_model"}
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in helpers or f'"{path.name}"' in tested, f"no test runs {path.name}"


def test_every_example_is_listed_and_nothing_else():
    listed = set(re.findall(r"^\| \[([^\]]+)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    helpers = {"digits_data.py", "digits_model.py", "demo.py", "demo_replicas.py"}
    there = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("**/*.py")}
    assert listed == {name for name in there - helpers if not name.startswith("recipes/")}


def test_single_program_trains_and_resumes(tmp_path):
    program = EXAMPLES / "single_program.py"
    first = run(program, f"--logdir={tmp_path}", "--steps=300")
    assert "starting from scratch" in first
    assert 300 in saved_steps(tmp_path)
    second = run(program, f"--logdir={tmp_path}", "--steps=600")
    assert f"resumed at step 300 from {tmp_path}/model.ckpt-300" in second
    assert 600 in saved_steps(tmp_path)
    assert accuracy(second) > 0.9
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    assert {"loss", "test_accuracy"} <= scalars(tmp_path).keys()


def test_manual_summaries_writes_one_every_100_steps(tmp_path):
    printed = fork(EXAMPLES / "manual_summaries.py", f"--logdir={tmp_path}", "--steps=501")
    assert sorted(scalars(tmp_path)["loss"]) == [0, 100, 200, 300, 400, 500]
    assert accuracy(printed) > 0.9


def test_extra_service_prints_the_loss_while_it_trains(tmp_path):
    printed = fork(EXAMPLES / "extra_service.py", f"--logdir={tmp_path}", "--steps=1500", "--every-secs=0.05")
    steps = [int(step) for step in re.findall(r"step +(\d+)   loss", printed)]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    assert accuracy(printed) > 0.9


def test_fewer_services_saves_by_its_own_rule_only(tmp_path):
    program = EXAMPLES / "fewer_services.py"
    fork(program, f"--logdir={tmp_path}", "--steps=300", "--save-every=100")
    assert saved_steps(tmp_path, "mine.ckpt") == {100, 200, 300}
    assert saved_steps(tmp_path) == set()
    second = fork(program, f"--logdir={tmp_path}", "--steps=400", "--save-every=100")
    assert f"restored {tmp_path}/mine.ckpt-300" in second
    assert accuracy(second) > 0.9


def test_custom_init_fn_starts_from_its_weights_once(tmp_path):
    program = EXAMPLES / "custom_init_fn.py"
    first = fork(program, f"--logdir={tmp_path}", "--steps=100")
    began = re.search(r"average digits: test accuracy ([\d.]+)%", first)
    assert float(began[1]) > 85
    assert accuracy(first) >= 0.9
    second = fork(program, f"--logdir={tmp_path}", "--steps=200")
    assert "average digits" not in second


def test_custom_local_init_op_runs_in_each_process(tmp_path):
    program = EXAMPLES / "custom_local_init_op.py"
    first = fork(program, f"--logdir={tmp_path}", "--steps=200")
    second = fork(program, f"--logdir={tmp_path}", "--steps=400")
    for printed in (first, second):
        assert printed.count("read 1438 digits") == 1
    assert "step   200" not in second, "the second run was to resume at step 200"
    assert accuracy(second) > 0.9


def test_session_manager_says_whether_it_restored(tmp_path):
    program = EXAMPLES / "session_manager.py"
    first = fork(program, f"--logdir={tmp_path}", "--steps=200")
    assert "nothing to restore" in first
    second = fork(program, f"--logdir={tmp_path}", "--steps=200")
    assert "restored at step 200" in second
    assert saved_steps(tmp_path) == {200, 400}
    assert accuracy(second) > 0.9


def test_queue_runners_ends_well_when_the_files_are_exhausted(tmp_path):
    printed = fork(EXAMPLES / "queue_runners.py", f"--logdir={tmp_path}", "--epochs=20")
    steps = 20 * 1438 // 128
    assert "training is finished" in printed
    assert f"model.ckpt-{steps}" in printed, "the last step was to be saved"
    assert accuracy(printed) > 0.85


def test_retry_on_aborted_comes_back_each_time(tmp_path):
    program = EXAMPLES / "retry_on_aborted.py"
    printed = fork(program, f"--logdir={tmp_path}", "--steps=2400", "--preempt-at", "800", "1600")
    assert printed.count("trying again") == 2
    assert printed.count("resumed at step") + printed.count("starting from scratch") == 3
    assert 2400 in saved_steps(tmp_path)
    assert accuracy(printed) > 0.9


def test_the_demo_kills_damages_resumes_and_compares(tmp_path):
    logdir = tmp_path / "demo"
    printed = run(EXAMPLES / "demo.py", f"--logdir={logdir}")
    killed_with, restored = (
        int(re.search(pattern, printed)[1])
        for pattern in (r"killed with SIGKILL at .* is of step (\d+)", r"restored +step (\d+) of")
    )
    assert 0 < restored < killed_with
    damaged = re.search(r"one bit of (\S+) is flipped", printed)[1]
    assert re.search(rf"^model.ckpt-{killed_with}: {re.escape(damaged)}: expected the digest", printed, re.MULTILINE)
    assert f"resumed at step {restored} from {logdir}/model.ckpt-{restored}" in printed
    assert accuracy(printed) > 0.95
    assert f"tensorboard --logdir {logdir}" in printed
    proof = re.search(r"^  proof +(.*)", printed, re.MULTILINE)[1]
    assert re.match(rf"steps {restored} to \d+ were done again: bit for bit the same", proof), proof
    assert re.search(r"^equal: \d+ tensors and values$", printed, re.MULTILINE), printed
    assert printed.endswith("is the one that was not, bit for bit.\n")


def test_the_demo_names_the_one_command_that_brings_what_it_lacks(tmp_path):
    # Without the packages of the environment, nothing but the standard library is there.
    for engine, target in (("tensorflow", "demo"), ("torch", "demo-torch"), ("jax", "demo-jax")):
        command = [
            sys.executable,
            "-I",
            "-S",
            str(EXAMPLES / "demo.py"),
            f"--engine={engine}",
            f"--logdir={tmp_path / engine}",
        ]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        assert ended.returncode == 1
        assert re.fullmatch(rf"the demo needs .*; `make {target}` installs all that it needs\n", ended.stderr), (
            ended.stderr
        )


def test_the_demo_fails_loudly_when_nothing_was_restored(tmp_path):
    sys.path.insert(0, str(EXAMPLES))
    try:
        import demo
    finally:
        sys.path.remove(str(EXAMPLES))
    forgetful = [sys.executable, "-c", "print('starting from scratch'); print('test accuracy 99.00%')"]
    assert demo.run_again(forgetful) == (None, 0.99)
    with pytest.raises(SystemExit, match="ended before it was killed"):
        demo.run_and_kill(forgetful, tmp_path, half=10)
    with pytest.raises(SystemExit, match=f"exit status -{signal.SIGKILL.value}"):
        demo.run_again([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
