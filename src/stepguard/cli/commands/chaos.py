"""``stepguard chaos``: put a run that is meant to stay through random faults, for a given time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from stepguard.cli.arguments import SECONDS, SECONDS_BETWEEN, some_of
from stepguard.cli.exits import FINDING
from stepguard.cli.proving.chaos import KINDS, Chaos, Outcome
from stepguard.cli.text import output
from stepguard.words import duration, printable


@click.command(
    short_help="Run a program under the launcher, with random faults for a given time.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="""\b
Examples:
  stepguard chaos --for-secs 3600 -- python train.py --logdir runs/digits
  stepguard chaos --faults kill,process --every-secs 10 -- torchrun --nproc-per-node 2 train.py

\b
Exit codes:
  0    the program has ended well, and steps that were done again were the same
  1    steps that were done again were not the same
  the exit code of `stepguard run` otherwise
""",
)
@click.option(
    "--for-secs", type=SECONDS, default=600.0, show_default=True, help="Seconds with faults; then the run goes on."
)
@click.option(
    "--every-secs",
    type=SECONDS_BETWEEN,
    default=30.0,
    show_default=True,
    help="Mean seconds between two faults.",
)
@click.option(
    "--faults",
    callback=some_of(KINDS),
    metavar="NAMES",
    default=",".join(KINDS),
    show_default=True,
    help="The faults, separated by commas; see `stepguard prove`.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same order.")
@click.argument("program", metavar="[--] PROGRAM [ARGUMENTS]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def command(
    context: click.Context,
    for_secs: float,
    every_secs: float,
    faults: tuple[str, ...],
    seed: int,
    program: tuple[str, ...],
) -> None:
    """Run PROGRAM to its end by `stepguard run`, in its own logdir, and put it through random faults meanwhile.

    Steps that are done again after a crash are compared with the first time, so that the end tells whether the run is
    the one that it would have been. A checkpoint that was damaged is put aside by the next start.
    """
    with tempfile.TemporaryDirectory(prefix="stepguard-chaos-", ignore_cleanup_errors=True) as announcements:
        chaos = Chaos(
            program,
            kinds=faults,
            lasts_secs=for_secs,
            every_secs=every_secs,
            seed=seed,
            announcements=Path(announcements),
            say=_say,
        )
        _say(f"faults for {duration(for_secs)}: {', '.join(faults)}")
        outcome = chaos.run()
    for line in _summary(outcome):
        _say(line)
    context.exit(FINDING if outcome.differs is not None and outcome.code == 0 else outcome.code)


def _say(line: str) -> None:
    click.echo(f"stepguard chaos: {printable(line)}", err=True)


def _summary(outcome: Outcome) -> list[str]:
    done = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.faults.items()))
    ended = "ended well" if outcome.code == 0 else f"ended with exit code {outcome.code}"
    lines = [f"{output.counted(sum(outcome.faults.values()), 'fault')} ({done}); the program {ended}"]
    if outcome.differs is not None:
        lines.append(f"NOT the same run: {outcome.differs}")
    elif outcome.replays:
        again = output.counted(outcome.steps_again, "step")
        lines.append(f"{again} done again and compared: bit for bit the same")
    else:
        lines.append("no step that was done again could be compared")
    return lines
