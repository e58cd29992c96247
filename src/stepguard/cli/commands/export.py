"""``stepguard export``: the weights of a checkpoint, in a file for other tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from stepguard.cli.arguments import Target, target_argument
from stepguard.cli.exits import FINDING, CommandError
from stepguard.cli.logdir import standings, tensor_readers, weight_files
from stepguard.cli.logdir.contents import GOOD, UNVERIFIED, ListedCheckpoint
from stepguard.cli.logdir.full_read import read_fully
from stepguard.cli.logdir.remote_image import filled
from stepguard.cli.text import output
from stepguard.cli.text.progress_bar import reading
from stepguard.store.saved_tensor import SavedWeight
from stepguard.words import listed, printable

# The names that programs give to the part with the weights, if there is more than one.
_USUAL = ("model", "params")


def _suffix_known(_context: click.Context, _argument: click.Parameter, value: Path) -> Path:
    if value.suffix not in weight_files.FORMATS:
        formats = ", ".join(weight_files.FORMATS)
        raise click.BadParameter(f"expected a file with one of the suffixes {formats}, got {printable(str(value))}")
    return value


@click.command(
    short_help="Write the weights of a checkpoint to a file for other tools.",
    epilog="""\b
Examples:
  stepguard export runs/digits digits.safetensors --weights      (of the one that a restart would take)
  stepguard export runs/digits digits.pt --weights --step best
  stepguard export runs/digits/model.ckpt-1200 head.npz --weights --part head
  stepguard export s3://bucket/runs/digits digits.pt --weights
""",
)
@target_argument("target", "CHECKPOINT")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path), callback=_suffix_known)
@click.option("--weights", "wants_weights", is_flag=True, help="What is exported: so far, weights are all that can be.")
@click.option("--part", metavar="NAME", help="The part of the state; by default 'model', 'params', or the only one.")
@click.option("--step", "asked", metavar="STEP|best|NAME", help="Which checkpoint of a logdir; by default the newest.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@output.json_option
def command(
    target: Target,
    out: Path,
    wants_weights: bool,
    part: str | None,
    asked: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the weights of one part of CHECKPOINT to OUT: a plain state_dict of PyTorch (.pt), .safetensors, or .npz.

    CHECKPOINT is one of PyTorch, JAX or TensorFlow, or a logdir, or the address of a mirror. It is read to its end and
    compared with its manifest first. The values are those that were saved: nothing is cast. A kill leaves OUT as it
    was. With TensorFlow a part is a variable scope; by default all variables but those of the optimizer are exported.

    Exit code 1: the checkpoint is damaged, there is no such part, or OUT exists. 3: the format has no room for a type.
    """
    if not wants_weights:
        raise click.UsageError("say what to export: --weights")
    if target.file is not None:
        raise click.UsageError(f"{printable(str(target.path))}: expected a checkpoint or a logdir, found a single file")
    if asked is not None and target.name is not None:
        raise click.UsageError(f"--step chooses in a logdir, and {printable(str(target.path))} is one checkpoint")
    if not overwrite:
        _check_vacant(out)
    one = target.checkpoint() if asked is None else standings.chosen(target.root, asked)
    with filled(one.checkpoint.root, one.checkpoint.name):
        one = _verified(one)
        name, weights = _chosen(one, tensor_readers.read_weights(one), part)
        size = weight_files.write(out, weights)
    if as_json:
        output.print_json(
            {
                "checkpoint": str(one.checkpoint.path),
                "step": one.checkpoint.step,
                "part": name,
                "out": str(out),
                "tensors": len(weights),
                "bytes": size,
            }
        )
        return
    step = "" if one.checkpoint.step is None else f" of step {one.checkpoint.step:,}"
    tensors = f"{output.counted(len(weights), 'tensor')} of {printable(name)}{step}"
    click.echo(f"{printable(str(out))}: {tensors}, {output.size(size)}")


def _check_vacant(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise CommandError(f"{out}: exists already; --overwrite replaces it", FINDING)


def _verified(one: ListedCheckpoint) -> ListedCheckpoint:
    path = one.checkpoint.path
    if not one.is_candidate:
        raise CommandError(f"{path}: {one.state}: {listed(one.reasons)}", FINDING)
    with reading("verifying", one.size) as on_block:
        read = read_fully(one, on_block=on_block)
    if read is None:
        raise CommandError(f"{path}: was removed while it was read: export a newer one", FINDING)
    if read.state not in (GOOD, UNVERIFIED):
        reasons = listed([reason for _, reason in read.damages] or read.listed.reasons)
        raise CommandError(f"{path}: {read.state}, so nothing was exported: {reasons}", FINDING)
    return read.listed


def _chosen(
    one: ListedCheckpoint, parts: Mapping[str, Sequence[SavedWeight]], wanted: str | None
) -> tuple[str, Sequence[SavedWeight]]:
    names = [wanted] if wanted is not None else [name for name in _USUAL if name in parts]
    if wanted is None and not names and len(parts) == 1:
        names = list(parts)
    if not names:
        raise CommandError(
            f"{one.checkpoint.path}: expected a part 'model' or 'params', or a single one, found {_found(parts)}; "
            f"choose with --part",
            FINDING,
        )
    if names[0] not in parts:
        raise CommandError(
            f"{one.checkpoint.path}: expected a part {printable(names[0])!r} with weights, found {_found(parts)}",
            FINDING,
        )
    return names[0], parts[names[0]]


def _found(parts: Mapping[str, Sequence[SavedWeight]]) -> str:
    return listed([printable(name) for name in parts]) or "no weights"
