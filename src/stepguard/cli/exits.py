"""The exit codes of every command. 0 is fine, and 2, a mistake in the arguments, is click's."""

from __future__ import annotations

FINDING = 1
"""What was looked at is damaged, or different, or the command refuses."""
NOT_DONE = 3
"""It could not be done: no permission, an unknown format, a missing package."""
READER_GONE = 141
"""The reader of the pipe has gone away: what a shell shows for a program that SIGPIPE ended."""
