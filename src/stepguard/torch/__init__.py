"""Stepguard for PyTorch: supervises the program's own training loop."""

from __future__ import annotations

from stepguard import frameworks

frameworks.require("torch")

from stepguard.steps.values import Values
from stepguard.torch.checkpoint.reading import Newest, States, load, newest
from stepguard.torch.session import Session
from stepguard.torch.supervisor import Supervisor

__all__ = ["Newest", "Session", "States", "Supervisor", "Values", "load", "newest"]
