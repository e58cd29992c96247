"""``stepguard rollback``: have a run go on at an earlier checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from stepguard.cli.arguments import LOGDIR
from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.logdir import standings
from stepguard.cli.logdir.contents import UNVERIFIED
from stepguard.cli.text import output
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.store.rollback import ASIDE, Rollback
from stepguard.watching import heartbeat, history
from stepguard.watching.ledger import Ledger
from stepguard.words import printable

_ROLE = "command"


@click.command(
    short_help="Have a run go on at an earlier checkpoint.",
    epilog="""\b
Examples:
  stepguard rollback runs/digits --to 1200
  stepguard rollback runs/digits --to best
  stepguard rollback runs/digits --to before-lr-drop
""",
)
@click.argument("logdir", type=LOGDIR)
@click.option("--to", "target", required=True, metavar="STEP|best|NAME", help="The checkpoint to go on at.")
@output.json_option
def command(logdir: Path, target: str, as_json: bool) -> None:
    """Put the checkpoints of LOGDIR that are newer than one of them aside, so that the next start goes on at that one.

    It is read to its end first. Nothing is removed: the newer ones are in aside/1, aside/2 and so on; to undo it, move
    them back before the next start. The ledger says so, and TensorBoard drops the later points of the curves.

    Exit code 1: there is no such checkpoint, it is damaged, or another process trains or prunes in LOGDIR.
    """
    with CheckpointStore(logdir).acquire():
        one = standings.chosen(logdir, target)
        if one.state == UNVERIFIED:
            raise CommandError(
                f"{one.checkpoint.path}: expected a checkpoint with a manifest, found none, so that nobody can tell "
                f"whether it is good",
                FINDING,
            )
        store = CheckpointStore(logdir, basename=one.basename, engine=one.engine, saver_files=tensorflow_files)
        done = store.roll_back(store.verify(one.checkpoint), target, by_program=False)
        _tell(logdir, done)
    aside = logdir / ASIDE / done.place if done.names else None
    if as_json:
        document = {"checkpoint": str(one.checkpoint.path), "step": done.step, "aside": aside and str(aside)}
        output.print_json({**document, "names": done.names})
        return
    step = "" if done.step is None else f", step {done.step:,}"
    newer = "no checkpoint was newer"
    if aside is not None:
        newer = f"{output.counted(len(done.names), 'newer checkpoint')} in {printable(str(aside))}"
    click.echo(f"rolled back to {printable(one.checkpoint.name)}{step}: {newer}")


def _tell(logdir: Path, done: Rollback) -> None:
    """Say it in the ledger, and in the event files, if there are any."""
    last = heartbeat.read_one(logdir, history.CHIEF)
    was = None if last is None else last.step
    Ledger(logdir, role=_ROLE).append("rollback", checkpoint=done.to, step=done.step, previous_step=was)
    has_curves = any(logdir.glob("*tfevents*")) and importlib.util.find_spec("tensorboard") is not None
    if has_curves and done.step is not None:
        from stepguard.steps.event_file import EventFile

        events = EventFile(str(logdir))
        events.started(done.step)
        events.close()
