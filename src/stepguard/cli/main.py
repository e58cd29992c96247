"""The entry point: the group of commands, each of which is imported when it is first asked for."""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from typing import Any

import click

from stepguard import __version__
from stepguard.cli import interrupts
from stepguard.cli.exits import FINDING, INTERRUPTED, NOT_DONE, READER_GONE, CommandError
from stepguard.cli.logdir import addresses
from stepguard.errors import CheckpointCorruptError, LogdirInUseError, NoGoodCheckpointError, StepguardError
from stepguard.words import printable

_COMMANDS = (
    *("ls", "verify", "prune", "keep", "unkeep", "best", "rollback", "show", "diff", "export"),
    *("events", "status", "log", "report", "save", "stop", "pull", "push", "run", "prove", "chaos"),
)
"""Their names, in the order in which --help has them."""

# Findings and refusals. Every other error means that the command could not do its work.
_FINDINGS = (CheckpointCorruptError, NoGoodCheckpointError, LogdirInUseError)


class Commands(click.Group):
    """The group of commands. An error of any command ends the process with one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of `_COMMANDS`."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command; None if there is no such command."""
        return _command(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that ``args`` name. Raises click.UsageError, with the nearest name, if there is none."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            if args[0] in ("help", "version"):
                raise click.UsageError(f"no such command {args[0]!r}: did you mean '--{args[0]}'?", ctx)
            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(_COMMANDS)}"
            raise click.UsageError(f"no such command {printable(args[0])!r}: {meant}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. An error becomes one line on stderr and an exit code; no traceback is shown."""
        try:
            with interrupts.as_before():
                return super().invoke(ctx)
        except CommandError as error:
            raise CommandError(addresses.shown(error.message), error.exit_code) from error
        except StepguardError as error:
            code = FINDING if isinstance(error, _FINDINGS) else NOT_DONE
            raise CommandError(addresses.shown(str(error)), code) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                _leave_the_pipe()
                ctx.exit(READER_GONE)
            raise CommandError(addresses.shown(_described(error)), NOT_DONE) from error
        except KeyboardInterrupt as error:
            raise CommandError("interrupted", INTERRUPTED) from error


def _command(name: str) -> click.Command | None:
    # Imported only when it is asked for: `stepguard --help` loads no command.
    match name:
        case "ls":
            from stepguard.cli.commands import ls

            return ls.command
        case "verify":
            from stepguard.cli.commands import verify

            return verify.command
        case "prune":
            from stepguard.cli.commands import prune

            return prune.command
        case "keep":
            from stepguard.cli.commands import keep

            return keep.command
        case "unkeep":
            from stepguard.cli.commands import unkeep

            return unkeep.command
        case "best":
            from stepguard.cli.commands import best

            return best.command
        case "rollback":
            from stepguard.cli.commands import rollback

            return rollback.command
        case "show":
            from stepguard.cli.commands import show

            return show.command
        case "diff":
            from stepguard.cli.commands import diff

            return diff.command
        case "export":
            from stepguard.cli.commands import export

            return export.command
        case "events":
            from stepguard.cli.commands import events

            return events.command
        case "status":
            from stepguard.cli.commands import status

            return status.command
        case "log":
            from stepguard.cli.commands import log

            return log.command
        case "report":
            from stepguard.cli.commands import report

            return report.command
        case "save":
            from stepguard.cli.commands import save

            return save.command
        case "stop":
            from stepguard.cli.commands import stop

            return stop.command
        case "pull":
            from stepguard.cli.commands import pull

            return pull.command
        case "push":
            from stepguard.cli.commands import push

            return push.command
        case "run":
            from stepguard.cli.commands import run

            return run.command
        case "prove":
            from stepguard.cli.commands import prove

            return prove.command
        case "chaos":
            from stepguard.cli.commands import chaos

            return chaos.command
    return None


def _described(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def _leave_the_pipe() -> None:
    # The interpreter flushes the buffer at its end, which would raise the same error once more.
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Exit codes, of every command but `run`, `prove` and `chaos`, which have their own:
  0    fine
  1    a finding: damaged, different, refused
  2    a mistake in the arguments
  3    not possible: no permission, unknown format, missing package
  130  ended by Ctrl-C
  141  the reader of a pipe has gone away (as `head` does)

With --json a command prints one JSON document on stdout, and nothing else; `log` and `status --follow`
print one on each line.
""",
)
@click.version_option(__version__, package_name="stepguard", message="stepguard %(version)s")
def cli() -> None:
    """See and steer training runs: look at their checkpoints, prove them good, clean up."""
    # Click calls this once the module of the command is imported, and before it reads the command's arguments.
    interrupts.raise_them()


def main() -> None:
    """Run the command that the arguments name. Ends the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal's encoding lacks are shown as escapes.
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="stepguard")
