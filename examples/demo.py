"""Train on real digits and be killed half-way with SIGKILL; lose a bit of the newest checkpoint; start again.

This program only starts, kills and watches the training program, in a process of its own, as you would:
``single_program.py``, with ``--engine=torch`` ``torch/digits.py``, or with ``--engine=jax`` ``jax/digits.py``. At the
end it trains a second time without a kill, and compares the two models.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = {
    "tensorflow": Path(__file__).with_name("single_program.py"),
    "torch": Path(__file__).with_name("torch") / "digits.py",
    "jax": Path(__file__).with_name("jax") / "digits.py",
}
# What each needs, and the command that brings it.
NEEDS = {
    "tensorflow": (("tensorflow", "stepguard"), "make demo"),
    "torch": (("torch", "stepguard"), "make demo-torch"),
    "jax": (("jax", "optax", "stepguard"), "make demo-jax"),
}
ENOUGH_ACCURACY = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"), help="default: %(default)s"
    )
    parser.add_argument("--engine", choices=sorted(PROGRAMS), default="tensorflow", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    args = parser.parse_args()
    if lacking := [name for name in NEEDS[args.engine][0] if importlib.util.find_spec(name) is None]:
        sys.exit(f"the demo needs {' and '.join(lacking)}; `{NEEDS[args.engine][1]}` installs all that it needs")
    if args.logdir.exists():
        sys.exit(f"{args.logdir} exists: the demo starts from nothing; give it a --logdir of its own")

    options = [
        f"--steps={args.steps}",
        f"--batch-size={args.batch_size}",
        "--save-model-secs=0",
        f"--save-model-steps={args.steps // 5}",
    ]
    command = [sys.executable, str(PROGRAMS[args.engine]), f"--logdir={args.logdir}", *options]

    print("A classifier learns handwritten digits under Stepguard. Half-way it is killed.\n")
    killed_at, newest = run_and_kill(command, args.logdir, half=args.steps // 2)
    print(f"killed with SIGKILL at about step {killed_at}; the newest checkpoint on disk is of step {newest}\n")

    damaged = flip_a_bit(args.logdir)
    print(f"one bit of {damaged} is flipped\n")
    verify = shown([sys.executable, "-m", "stepguard", "verify", str(args.logdir)])
    if subprocess.run(verify, check=False).returncode != 1:
        sys.exit("DEMO FAILED: expected `stepguard verify` to find the flipped bit")

    print("\nThe same command again: it goes on from the newest checkpoint that is good.\n")
    restored, accuracy = run_again(command)
    if restored is None or not 0 < restored < newest:
        sys.exit(f"DEMO FAILED: expected to resume before step {newest}, which is damaged, found {restored}")
    if accuracy is None or accuracy <= ENOUGH_ACCURACY:
        sys.exit(f"DEMO FAILED: expected a test accuracy over {ENOUGH_ACCURACY:.0%}, found {accuracy}")

    print("\nwhat came of it")
    print(f"  test accuracy   {accuracy:.2%}, on 359 digits that it never saw in training")
    print(f"  restored        step {restored} of {args.steps}, from the checkpoint before the damaged one")
    print(f"  proof           {proof_of_replay(args.logdir)}")
    print(f"  checkpoints     {args.logdir}/model.ckpt-*: steps {', '.join(map(str, saved_steps(args.logdir)))}")
    print(f"  look at them    tensorboard --logdir {shlex.quote(str(args.logdir))}\n")

    print("The same training without a kill, for comparison:\n")
    undisturbed = args.logdir.with_name(f"{args.logdir.name}-undisturbed")
    run_again([*command[:2], f"--logdir={undisturbed}", *options])
    print()
    diff = shown([sys.executable, "-m", "stepguard", "diff", str(args.logdir), str(undisturbed)])
    if subprocess.run(diff, check=False).returncode != 0:
        sys.exit("DEMO FAILED: expected the same model as without the kill")
    print("\nThe model that was killed, damaged and resumed is the one that was not, bit for bit.")


def run_and_kill(command: list[str], logdir: Path, half: int) -> tuple[int, int]:
    """Run ``command`` until step ``half``, and kill it. Return the last step that it printed, and the newest saved.

    The first checkpoint may be of the first step: the kill waits for two to which it is worth going back.
    """
    step = 0
    with start(command) as process:
        for line in lines_of(process):
            step = step_in(line) or step
            if step >= half and len([saved for saved in saved_steps(logdir) if saved > 1]) > 1:
                # A start completes a checkpoint that lacks nothing but its manifest: no such one may be newest.
                while half_written(logdir) and process.poll() is None:
                    time.sleep(0.01)
                process.kill()
                break
        else:
            sys.exit(f"DEMO FAILED: the program ended before it was killed, with exit status {process.wait()}")
    return step, newest_step(logdir)


def run_again(command: list[str]) -> tuple[int | None, float | None]:
    """Run ``command`` to its end. Return the step at which it resumed, and its test accuracy, as it reports them."""
    restored = accuracy = None
    with start(command) as process:
        for line in lines_of(process):
            if found := re.match(r"resumed at step (\d+)", line):
                restored = int(found[1])
            if found := re.match(r"test accuracy ([\d.]+)%", line):
                accuracy = float(found[1]) / 100
    if process.returncode != 0:
        sys.exit(f"DEMO FAILED: the program ended with exit status {process.returncode}")
    return restored, accuracy


def shown(command: list[str]) -> list[str]:
    """Print a command as one would type it, and return it."""
    print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
    return command


def start(command: list[str]) -> subprocess.Popen[str]:
    shown(command)
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
    return subprocess.Popen(
        command, env={**quiet, **os.environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """Show every line that the process prints, and yield it."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        yield line


def step_in(line: str) -> int:
    found = re.match(r"step +(\d+)", line)
    return int(found[1]) if found else 0


def newest_step(logdir: Path) -> int:
    """Return the step of the newest committed checkpoint, and 0 where there is none."""
    return max(saved_steps(logdir), default=0)


def saved_steps(logdir: Path) -> list[int]:
    # A checkpoint exists when its manifest does.
    return sorted(int(path.name.split("-")[1].split(".")[0]) for path in logdir.glob("model.ckpt-*.manifest.json"))


def half_written(logdir: Path) -> bool:
    """Return whether a checkpoint is being written: files with its name are there, and its manifest is not."""
    names = {found[0] for path in logdir.iterdir() if (found := re.search(r"model\.ckpt-\d+", path.name))}
    return any(not (logdir / f"{name}.manifest.json").exists() for name in names)


def proof_of_replay(logdir: Path) -> str:
    """Return what the last start has found about the steps that it did again, from the ledger."""
    lines = [json.loads(line) for line in (logdir / "run.jsonl").read_text().splitlines()]
    replays = [line["message"] for line in lines if line["event"] == "replay"]
    return replays[-1] if replays else "no step had to be done again"


def flip_a_bit(logdir: Path) -> Path:
    """Flip one bit of the largest data file of the newest checkpoint, and return the file."""
    name = f"model.ckpt-{newest_step(logdir)}"
    manifest = json.loads((logdir / f"{name}.manifest.json").read_text())
    data = [file for file in manifest["files"] if not file["name"].endswith(".meta")]
    path = logdir / max(data, key=lambda file: file["size"])["name"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    main()
