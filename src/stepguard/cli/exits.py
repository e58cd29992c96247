"""The exit codes of every command. 0 is fine, and 2, a mistake in the arguments, is click's."""

from __future__ import annotations

from typing import Any

import click

from stepguard.words import printable

FINDING = 1
"""The command has found damage or a difference, or refuses."""
NOT_DONE = 3
"""The command could not do its work: no permission, an unknown format, a missing package."""
NOTHING_YET = 4
"""`status --probe` has found no heartbeat: nothing has run there, or the program is not as far yet."""
INTERRUPTED = 130
"""Ctrl-C ended the command. A shell reports the same code for a program that SIGINT ended."""
READER_GONE = 141
"""The reader of the pipe has gone. A shell reports the same code for a program that SIGPIPE ended."""


class CommandError(click.ClickException):
    """An error that ends a command, with one line on stderr."""

    def __init__(self, message: str, exit_code: int) -> None:
        # It may quote what a file holds, or how it is called.
        super().__init__("\n".join(map(printable, message.split("\n"))))
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"stepguard: {self.format_message()}", file=file, err=file is None)
