"""``stepguard push``: send checkpoints and history of a logdir to a mirror."""

from __future__ import annotations

from pathlib import Path

import click

from stepguard.cli.arguments import LOGDIR, mirror_at
from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.logdir import standings
from stepguard.cli.logdir.contents import DAMAGED, GOOD, ListedCheckpoint, list_contents
from stepguard.cli.text import output
from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.remote.copies import Copies
from stepguard.remote.history import History
from stepguard.remote.lease import Lease
from stepguard.remote.opening import open_remote
from stepguard.store import Manifest, rollback
from stepguard.words import listed, printable

_LEASE_SECS = 60.0


@click.command(
    short_help="Send a run from a logdir to a mirror.",
    epilog="""\b
Examples:
  stepguard push runs/digits s3://bucket/runs/digits
  stepguard push runs/digits /mnt/backup/digits --all
""",
)
@click.argument("logdir", type=LOGDIR)
@click.argument("mirror", callback=mirror_at, metavar="URL")
@click.option("--all", "wants_all", is_flag=True, help="Every good checkpoint, and not only the newest.")
@output.json_option
@click.pass_context
def command(ctx: click.Context, logdir: Path, mirror: str, wants_all: bool, as_json: bool) -> None:
    """Send the newest good checkpoint of LOGDIR to the mirror at URL, and the ledger and event files with it.

    What the mirror has already is read to its end, and what differs is sent again. The manifest goes last. A run with
    that mirror does the same by itself.

    Exit code 1: a checkpoint is damaged in LOGDIR, or there is none, or a run trains into the mirror.
    """
    copies = Copies(open_remote(mirror))
    sent: list[str] = []
    repaired: list[str] = []
    damaged: dict[str, str] = {}
    lease = Lease(copies.remote, logdir.absolute(), lease_secs=_LEASE_SECS, on_lost=lambda _: None)
    lease.acquire()
    try:
        before: Manifest | None = None
        is_put_back = _is_put_back(copies, logdir)
        for one in _committed(logdir):
            manifest = one.checkpoint.manifest
            if manifest is None or one.state == DAMAGED:
                damaged[one.checkpoint.name] = listed(one.reasons)
                continue
            try:
                if (fixed := _repaired(copies, logdir, manifest, anew=is_put_back and before is None)) is not None:
                    repaired += fixed
                else:
                    copies.send(logdir, manifest, before, check=lease.check)
                    sent.append(manifest.name)
            except CheckpointCorruptError as error:
                damaged[manifest.name] = str(error)
                continue
            before = manifest
            if not wants_all:
                break
        if sent or is_put_back:
            there = [one.name for one in copies.listed()]
            newest = next(one.checkpoint.name for one in _committed(logdir) if one.checkpoint.name in there)
            copies.state(newest, reversed(there))
        history = History(logdir, copies.remote, copies.pace).send(is_last=True)
    finally:
        lease.release()
    if as_json:
        output.print_json({"pushed": sent, "repaired": repaired, "damaged": damaged, "history": history})
    else:
        _print(sent, repaired, damaged, history)
    if damaged:
        ctx.exit(FINDING)


def _committed(logdir: Path) -> list[ListedCheckpoint]:
    """The checkpoints with a manifest, the newest first, also if it cannot be read; at least one is good."""
    found = [one for one in list_contents(logdir).found if one.is_candidate and one.checkpoint.root == logdir]
    if not any(one.state == GOOD for one in found):
        raise CommandError(
            f"{logdir}: expected a good checkpoint with a manifest, found none; see `stepguard verify {logdir}`",
            FINDING,
        )
    return [one for one in found if one.checkpoint.manifest is not None or standings.manifest_error(one) is not None]


def _is_put_back(copies: Copies, logdir: Path) -> bool:
    """Whether a rollback here has given up the checkpoint from which another machine would go on."""
    last = rollback.read(logdir)
    try:
        newest = [copies.manifest(one.name) for one in copies.listed()[:1]] if last is not None else []
    except (CheckpointError, FileNotFoundError):
        return False
    return any(last is not None and last.gives_up(one.step, one.time) for one in newest)


def _repaired(copies: Copies, logdir: Path, manifest: Manifest, *, anew: bool) -> list[str] | None:
    """Send again what differs in the mirror, and the manifest if its marks do, or ``anew``.

    Returns the names of the files; ``None`` if the checkpoint is not there as it is here.
    """
    found = next((one for one in copies.listed() if one.name == manifest.name), None)
    try:
        there = None if found is None else copies.manifest(manifest.name)
    except (CheckpointCorruptError, FileNotFoundError):
        return None
    if found is None or there is None or there.files != manifest.files:
        return None
    damages = copies.damages(found, manifest, reads=True)
    for record, _ in damages:
        copies.send_file(logdir / record.name, record)
    if anew or there.marks != manifest.marks:
        copies.send_manifest(manifest)
    return [record.name for record, _ in damages]


def _print(sent: list[str], repaired: list[str], damaged: dict[str, str], history: list[str]) -> None:
    for name in sent:
        click.echo(f"pushed  {printable(name)}")
    for name in repaired:
        click.echo(f"repaired in the mirror: {printable(name)}")
    for name, reason in damaged.items():
        click.echo(f"damaged here: {printable(name)}: {printable(reason)}")
    click.echo(f"{output.counted(len(sent), 'checkpoint')} pushed, and {output.counted(len(history), 'file')} beside")
