"""``stepguard run``: start a program, and start it again when it has crashed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import click

from stepguard.cli.arguments import NEW_LOGDIR, SECONDS
from stepguard.cli.exits import NOT_DONE, CommandError
from stepguard.cli.launcher.launcher import CRASH_LOOP_EXIT, Launcher
from stepguard.cli.launcher.requeue import RequeueRefusedError, SlurmJob
from stepguard.cli.launcher.restarts import Restarts
from stepguard.cli.text import output
from stepguard.stops import PREEMPTING, SLURM, STOPPED_EXIT
from stepguard.watching.history import History
from stepguard.words import duration, printable


@click.command(
    short_help="Start a program, and start it again when it has crashed.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=f"""\b
Examples:
  stepguard run -- python train.py --logdir runs/digits
  stepguard run --max-restarts 5 -- torchrun --nproc-per-node 4 train.py
  stepguard run --logdir runs/old -- python -m stepguard.tensorflow old_train.py
  stepguard run --requeue slurm -- python train.py

\b
Exit codes:
  the program's own last one; 128 + n when signal n ended it
  {STOPPED_EXIT}   instead of 0, after a stop by a signal or at the end of its time: start it again
  {CRASH_LOOP_EXIT}   a crash loop
  3    --requeue was asked for, and is not possible; nothing was started
  126  the program cannot be executed
  127  there is no such program
""",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Start it again so often at most.",
)
@click.option(
    "--logdir",
    type=NEW_LOGDIR,
    help="The program's logdir, where Stepguard in the program cannot tell it.",
)
@click.option(
    "--first-delay-secs",
    type=SECONDS,
    default=1.0,
    show_default=True,
    help="Seconds before the first restart; each start without progress doubles them.",
)
@click.option(
    "--longest-delay-secs",
    type=SECONDS,
    default=300.0,
    show_default=True,
    help="Seconds before a restart, at most.",
)
@click.option(
    "--grace-secs",
    type=SECONDS,
    default=150.0,
    show_default=True,
    help="Seconds that processes left behind by a program that has failed may take to stop.",
)
@click.option(
    "--requeue",
    type=click.Choice([SLURM]),
    help="Put the job back into the queue of Slurm when the run was preempted: stopped by SIGTERM, by a warning "
    "(SIGUSR1, SIGUSR2), or at the end of its time.",
)
@click.option(
    "--max-requeues",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Requeue a job so often at most.",
)
@click.option("--announcements", type=click.Path(exists=True, file_okay=False, path_type=Path), hidden=True)
@click.argument("program", metavar="[--] PROGRAM [ARGUMENTS]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def command(
    context: click.Context,
    max_restarts: int,
    logdir: Path | None,
    first_delay_secs: float,
    longest_delay_secs: float,
    grace_secs: float,
    requeue: str | None,
    max_requeues: int,
    announcements: Path | None,
    program: tuple[str, ...],
) -> None:
    """Start PROGRAM, and start it again after a crash, with growing delays in between.

    PROGRAM is not started again after a clean end, a stop request (SIGTERM, Ctrl-C, a closed terminal), a mistake in
    its arguments (exit code 2), or a crash loop: three starts in a row that made no progress, neither a newer step nor
    a newer checkpoint, and ended with the same failure.

    Signals that PROGRAM handles are passed on, and others become requests to stop; a second stop request kills the
    program and every process that it has started. PROGRAM may also be torchrun or a script that starts several
    replicas. For a program that never opens a session, only the exit code is known.
    """
    began = time.time()
    job = None if requeue is None else _job()
    restarts = Restarts(most=max_restarts, first_delay_secs=first_delay_secs, longest_delay_secs=longest_delay_secs)
    launcher = Launcher(
        program, logdir=logdir, restarts=restarts, grace_secs=grace_secs, say=_say, announcements=announcements
    )
    exit_code = launcher.run()
    if launcher.preemption is not None:
        exit_code = exit_code or STOPPED_EXIT
    _say(_summary(exit_code, launcher.request, restarts.done, time.time() - began, launcher.histories()))
    if job is not None and launcher.preemption is not None:
        _requeue(job, max_requeues)
    context.exit(exit_code)


def _job() -> SlurmJob:
    try:
        job = SlurmJob.of(os.environ)
        job.check(_say)
    except RequeueRefusedError as error:
        raise CommandError(str(error), NOT_DONE) from error
    return job


def _requeue(job: SlurmJob, most: int) -> None:
    if not job.is_first:
        # The first of those that srun has started does it for all.
        return
    # Slurm may repeat its signals, and ends this process once the job is in the queue.
    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTING)
    try:
        job.requeue(most)
    except RequeueRefusedError as error:
        _say(printable(str(error)))
    else:
        _say(f"job {printable(job.name)} is in the queue again, and goes on from the last checkpoint")


def _say(line: str) -> None:
    # The program's standard output is its own.
    click.echo(f"stepguard: {line}", err=True)


def _summary(
    exit_code: int, request: str | None, restarts: int, secs: float, histories: list[tuple[Path, History]]
) -> str:
    ending = "ended well" if exit_code == 0 else f"ended with exit code {exit_code}"
    if request is not None:
        ending = f"stopped ({request}), exit code {exit_code},"
    lines = [f"{ending} after {duration(secs)}, {output.counted(restarts, 'restart')}"]
    lines += [f"{printable(str(logdir))}: {output.accounted(found)}" for logdir, found in histories]
    return "\n  ".join(lines)
