"""``stepguard prove``: show for a program that a resumed run is the run that was interrupted."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from stepguard.cli.arguments import SECONDS, some_of
from stepguard.cli.exits import FINDING
from stepguard.cli.proving import report
from stepguard.cli.proving.faults import KINDS
from stepguard.cli.proving.program import Clock, Program
from stepguard.cli.proving.proof import DIFFERENT, NOT_DETERMINISTIC, NOT_TRIED, NotTriedError, Options, Proof, Result
from stepguard.cli.proving.scratch import Scratch
from stepguard.cli.text import output
from stepguard.words import duration, printable

_NOT_TRIED_EXIT = 2
_SHOWN_LINES = 8

# What the frameworks read when they start. Their functions are called in the program, when it makes its Supervisor.
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONHASHSEED": "0",
    "TF_DETERMINISTIC_OPS": "1",
    "TF_CUDNN_DETERMINISTIC": "1",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "NVIDIA_TF32_OVERRIDE": "0",
}
_XLA = "--xla_gpu_deterministic_ops=true"


@click.command(
    short_help="Prove that a resumed run is the run that was interrupted.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=f"""\b
Examples:
  stepguard prove -- python train.py --logdir runs/digits
  stepguard prove --steps 500 --faults kill,damage -- python train.py
  stepguard prove -- torchrun --standalone --nproc-per-node 2 train.py

\b
Faults:
  kill       SIGKILL at random moments, three times
  save       SIGKILL during a save, twice
  sigterm    SIGTERM
  interrupt  Ctrl-C
  damage     a bit of the newest checkpoint is flipped, after SIGKILL
  disk       a full disk for up to 3 s (on Linux)
  process    SIGKILL for one of several processes

\b
Exit codes:
  0    proven: every run is the same, bit for bit
  1    not the same, or not deterministic
  {_NOT_TRIED_EXIT}    it, or one of the faults, could not be tried
""",
)
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=200,
    show_default=True,
    help="The step at which each run stops, unless the program ends earlier.",
)
@click.option(
    "--faults",
    callback=some_of(KINDS),
    metavar="NAMES",
    default=",".join(KINDS),
    help="What the runs are put through, separated by commas. By default everything listed below.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same faults."
)
@click.option(
    "--save-steps",
    type=click.IntRange(min=1),
    help="Save each so many steps, as well as when the program does. By default a tenth of --steps.",
)
@click.option(
    "--deterministic", is_flag=True, help="Set what PyTorch, CUDA, JAX and TensorFlow offer for deterministic results."
)
@click.option(
    "--time-limit-secs", type=SECONDS, default=1800.0, show_default=True, help="Give up after so many seconds."
)
@click.option(
    "--scratch",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Where the runs write. By default the system's temporary directory.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="How many runs there are at a time. By default two, and one on a machine with a GPU.",
)
@click.option("--show-output", is_flag=True, help="Show on standard error what the program prints.")
@output.json_option
@click.argument("program", metavar="[--] PROGRAM [ARGUMENTS]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def command(
    context: click.Context,
    steps: int,
    faults: tuple[str, ...],
    seed: int,
    save_steps: int | None,
    deterministic: bool,
    time_limit_secs: float,
    scratch: Path | None,
    jobs: int | None,
    show_output: bool,
    as_json: bool,
    program: tuple[str, ...],
) -> None:
    """Run PROGRAM, unchanged, twice undisturbed and then through faults, and compare the runs bit for bit.

    Each run is resumed until it reaches the same step. Compared are the batches that it saw, the numbers that it
    reported, the random states, and every part of the last state. All Supervisors write to scratch logdirs; Python code
    of the program that would change a file in its own logdir is stopped.
    """
    options = Options(steps, faults, seed, save_steps, deterministic, jobs or _jobs())
    lines = _Lines(is_quiet=as_json)
    clock = Clock(time_limit_secs)
    runner = Program(program, clock, environment=environment(is_deterministic=deterministic), is_shown=show_output)
    place = Scratch(scratch)
    lines.say(
        f"{printable(report.name_of(program))}, up to step {steps}, in at most {duration(time_limit_secs)}, with a "
        f"checkpoint each {options.spacing} steps, in scratch logdirs and not in its own"
    )
    proof = Proof(runner, place, options, show=lines.show, tell=lines.tell, say=lines.say)
    # A job whose time is over is told so by SIGTERM: nothing is left behind then either.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        verdict = proof.prove()
    except (NotTriedError, OSError) as error:
        _not_tried(context, error, program, options, lines, as_json=as_json)
    finally:
        lines.clear()
        runner.kill()
        # A logdir that was said to be kept is kept, also if the proof does not come to its end.
        if all(one.is_same for one in proof.verdict.results):
            place.remove()
        signal.signal(signal.SIGTERM, before)
    if as_json:
        output.print_json(report.document(verdict, program, options))
    for line in report.conclusion(verdict, program, options):
        lines.result(line)
    codes = {DIFFERENT: FINDING, NOT_DETERMINISTIC: FINDING, NOT_TRIED: _NOT_TRIED_EXIT}
    context.exit(codes.get(verdict.verdict, 0))


def _not_tried(
    context: click.Context,
    error: Exception,
    program: tuple[str, ...],
    options: Options,
    lines: _Lines,
    *,
    as_json: bool,
) -> None:
    printed = error.lines if isinstance(error, NotTriedError) else []
    if isinstance(error, OSError):
        why = f"{printable(program[0])} could not be started: {error.strerror or error}"
    else:
        why = str(error)
    lines.clear()
    if as_json:
        output.print_json({"verdict": "not tried", "program": list(program), "seed": options.seed, "reason": why})
    click.echo(f"stepguard: not tried: {printable(why)}", err=True)
    for one in printed[-_SHOWN_LINES:]:
        click.echo(f"  {printable(one)}", err=True)
    context.exit(_NOT_TRIED_EXIT)


def _jobs() -> int:
    # Two runs may not fit into the memory of one GPU, and one processor has no time for two.
    has_gpu = any(os.path.exists(path) for path in ("/dev/nvidia0", "/dev/kfd"))
    return 1 if has_gpu or (os.cpu_count() or 1) < 2 else 2


def environment(*, is_deterministic: bool) -> dict[str, str]:
    """The variables that a program is started with, besides those of this process."""
    if not is_deterministic:
        return {}
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_XLA}".strip()
    return {**_DETERMINISTIC, "XLA_FLAGS": flags}


class _Lines:
    """What is printed: results on stdout, the rest on stderr, with a progress line if that is a terminal."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._is_terminal = sys.stderr.isatty()
        self._shown = 0

    def say(self, line: str) -> None:
        self.clear()
        click.echo(f"stepguard: {line}", err=True)

    def result(self, line: str) -> None:
        self.clear()
        if not self._is_quiet:
            click.echo(line)

    def show(self, result: Result, begins_at: int) -> None:
        self.result(report.line(result, begins_at))
        for line in report.details(result):
            self.result(line)

    def tell(self, what: str, start: int, step: int | None) -> None:
        if not self._is_terminal:
            return
        where = "starting" if step is None else f"step {step}"
        line = f"  {what}: start {start}, {where}"[: report.WIDTH - 1]
        click.echo("\r" + line.ljust(self._shown), err=True, nl=False)
        self._shown = len(line)

    def clear(self) -> None:
        if self._shown:
            click.echo("\r" + " " * self._shown + "\r", err=True, nl=False)
            self._shown = 0
