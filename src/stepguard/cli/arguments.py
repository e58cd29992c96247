"""The kinds of arguments that commands share."""

from __future__ import annotations

from pathlib import Path

import click

LOGDIR = click.Path(exists=True, file_okay=False, path_type=Path)
"""A directory that exists."""
