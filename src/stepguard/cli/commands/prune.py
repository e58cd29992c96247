"""``stepguard prune``: remove checkpoints that nobody needs, and never the newest good one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from stepguard.cli.arguments import LOGDIR_OR_URL
from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.logdir.contents import DAMAGED, GOOD, ListedCheckpoint, list_contents
from stepguard.cli.logdir.full_read import read_fully
from stepguard.cli.logdir.remote_image import Image, filled, image_of
from stepguard.cli.logdir.standings import standings
from stepguard.cli.text import output
from stepguard.cli.text.progress_bar import reading
from stepguard.remote.copies import Copies
from stepguard.remote.lease import Lease
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.words import printable

_LOOKS = 10
_LEASE_SECS = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with the checkpoints of one basename; each list goes from newest to oldest.

    ``newest_good`` was read to its end.
    """

    basename: str
    newest_good: ListedCheckpoint
    removed: tuple[ListedCheckpoint, ...]
    kept: tuple[ListedCheckpoint, ...]
    damaged: tuple[ListedCheckpoint, ...]


@click.command(
    short_help="Remove old checkpoints, and never the newest good one.",
    epilog="""\b
Examples:
  stepguard prune runs/digits --keep-last 5 --dry-run
  stepguard prune runs/digits --keep-last 5 --keep-every 10000
  stepguard prune s3://bucket/runs/digits --keep-last 5
""",
)
@click.argument("logdir", type=LOGDIR_OR_URL)
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the N newest.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="STEPS", help="Keep each multiple of STEPS.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@output.json_option
@click.pass_context
def command(
    ctx: click.Context, logdir: Path, keep_last: int | None, keep_every: int | None, dry_run: bool, as_json: bool
) -> None:
    """Remove the checkpoints of LOGDIR that neither --keep-last nor --keep-every keeps; one of them must be given.

    The newest good checkpoint always stays (it is read to its end to make sure), and so does every newer one, and those
    that are the best, named or kept (`stepguard ls` says why). Damaged checkpoints do not count, and stay: `stepguard
    verify` names them, and the next start of the program moves them to quarantine/. Checkpoints with different
    basenames are counted separately.

    Exit code 1: another process trains or prunes in LOGDIR, or no checkpoint is good, and nothing was removed; or the
    system could not read something, which is named and left as it is.
    """
    if keep_last is None and keep_every is None:
        raise click.UsageError("expected --keep-last or --keep-every, or both: else all but one would be removed")
    with _hold(logdir, dry_run=dry_run):
        plans = _plans(logdir, keep_last, keep_every)
        if not dry_run:
            for plan in plans:
                _remove(logdir, plan)
    if as_json:
        output.print_json(_document(logdir, plans, dry_run=dry_run))
    else:
        _print(logdir, plans, dry_run=dry_run)
    unreadable = list_contents(logdir).unreadable
    for reason in unreadable if not as_json else ():
        click.echo(printable(reason))
    if unreadable or any(one.is_unreadable for plan in plans for one in plan.damaged):
        ctx.exit(FINDING)


def _remove(logdir: Path, plan: Plan) -> None:
    image = image_of(logdir)
    if image is not None:
        names = {one.checkpoint.name for one in plan.removed}
        copies = Copies(image.remote)
        copies.remove([one for one in copies.listed() if one.name in names])
    store = CheckpointStore(logdir, basename=plan.basename, saver_files=tensorflow_files)
    store.remove([one.checkpoint for one in plan.removed], newest_good=plan.newest_good.checkpoint)


def _hold(logdir: Path, *, dry_run: bool) -> AbstractContextManager[object]:
    """The chief's lock, which a training or another `prune` may hold. A dry run removes nothing and needs no lock."""
    image = image_of(logdir)
    if image is not None and not dry_run:
        return _leased(image)
    return nullcontext() if dry_run else CheckpointStore(logdir).acquire()


@contextmanager
def _leased(image: Image) -> Iterator[None]:
    lease = Lease(image.remote, image.path, lease_secs=_LEASE_SECS, on_lost=lambda _: None)
    lease.acquire()
    try:
        yield
    finally:
        lease.release()


def _plans(logdir: Path, keep_last: int | None, keep_every: int | None) -> list[Plan]:
    found: list[Plan | None] = []
    for _ in range(_LOOKS):
        found = [
            _plan(logdir, basename, group, keep_last, keep_every) for basename, group in _by_basename(logdir).items()
        ]
        if None not in found:
            break
    return [plan for plan in found if plan is not None]


def _by_basename(logdir: Path) -> dict[str, list[ListedCheckpoint]]:
    groups: dict[str, list[ListedCheckpoint]] = {}
    for one in list_contents(logdir).found:
        # Leave a checkpoint that is being replaced to the chief.
        if one.is_candidate and one.checkpoint.root == logdir:
            groups.setdefault(one.basename, []).append(one)
    return groups


def _plan(
    logdir: Path, basename: str, found: Sequence[ListedCheckpoint], keep_last: int | None, keep_every: int | None
) -> Plan | None:
    """The plan for one basename; None if a training has pruned all of ``found`` meanwhile, so that newer ones exist."""
    found, newest_good = _proven(found)
    if not found:
        return None
    if newest_good is None:
        raise CommandError(
            f"{logdir}: expected a good checkpoint {basename}-*, found none among {len(found)}: nothing was removed; "
            f"`stepguard verify` says what is wrong with them",
            FINDING,
        )
    sound = [one for one in found if one.state != DAMAGED]
    pinned = standings([*found]).pop(basename).pinned
    kept: list[ListedCheckpoint] = []
    removed: list[ListedCheckpoint] = []
    for number, one in enumerate(sound):
        is_kept = number <= sound.index(newest_good) or (keep_last is not None and number < keep_last)
        is_kept = is_kept or one.checkpoint.name in pinned
        step = one.checkpoint.step
        is_kept = is_kept or (keep_every is not None and step is not None and step % keep_every == 0)
        (kept if is_kept else removed).append(one)
    damaged = [one for one in found if one.state == DAMAGED]
    return Plan(basename, newest_good, tuple(removed), tuple(kept), tuple(damaged))


def _proven(found: Sequence[ListedCheckpoint]) -> tuple[list[ListedCheckpoint], ListedCheckpoint | None]:
    """Read from newest to oldest until one is proven good by its manifest, or else by TensorFlow's own checksums.

    Returns all checkpoints with their states as known now, and the newest good one. Checkpoints that a training has
    pruned meanwhile are left out; this happens in a dry run only.
    """
    known: list[ListedCheckpoint] = []
    readable = None
    with reading("reading the newest", sum(one.size for one in found[:1])) as on_block:
        for number, one in enumerate(found):
            if one.state == DAMAGED:
                known.append(one)
                continue
            with filled(one.checkpoint.root, one.checkpoint.name):
                read = read_fully(one, on_block=on_block)
            if read is None:
                continue
            known.append(read.listed)
            if read.state == GOOD:
                return [*known, *found[number + 1 :]], read.listed
            if read.is_readable and readable is None:
                readable = read.listed
    return known, readable


def _document(logdir: Path, plans: Sequence[Plan], *, dry_run: bool) -> dict[str, Any]:
    def names(which: str) -> list[str]:
        return [one.checkpoint.name for plan in plans for one in getattr(plan, which)]

    return {
        "logdir": str(logdir),
        "dry_run": dry_run,
        "removed": names("removed"),
        "kept": names("kept"),
        "damaged": names("damaged"),
        "newest_good": [plan.newest_good.checkpoint.name for plan in plans],
        "bytes": sum(one.size for plan in plans for one in plan.removed),
    }


def _print(logdir: Path, plans: Sequence[Plan], *, dry_run: bool) -> None:
    if not plans:
        click.echo(f"{printable(str(logdir))}: no checkpoints")
    for plan in plans:
        for one in plan.removed:
            click.echo(f"{'would remove' if dry_run else 'removed'}  {printable(one.checkpoint.name)}")
        for one in plan.damaged:
            why = f" ({printable('; '.join(one.reasons))})" if one.is_unreadable else ""
            click.echo(f"damaged, left as it is: {printable(one.checkpoint.name)}{why}")
        size = output.size(sum(one.size for one in plan.removed))
        done = "would be removed" if dry_run else "removed"
        newest = printable(plan.newest_good.checkpoint.name)
        click.echo(f"{len(plan.removed)} {done} ({size}), {len(plan.kept)} kept; the newest good one is {newest}")
