"""The exit codes of every command. 0 is fine, and 2, a mistake in the arguments, is click's."""

from __future__ import annotations

from typing import Any

import click

FINDING = 1
"""What was looked at is damaged, or different, or the command refuses."""
NOT_DONE = 3
"""It could not be done: no permission, an unknown format, a missing package."""
READER_GONE = 141
"""The reader of the pipe has gone away: what a shell shows for a program that SIGPIPE ended."""


class CommandError(click.ClickException):
    """The end of a command by an error: one line on stderr."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"stepguard: {self.format_message()}", file=file, err=file is None)
