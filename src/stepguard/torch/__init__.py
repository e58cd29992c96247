"""Stepguard for PyTorch: a training loop of the program's own, supervised."""

from __future__ import annotations

from stepguard.torch.session import Session
from stepguard.torch.supervisor import Supervisor
from stepguard.torch.values import Values

__all__ = ["Session", "Supervisor", "Values"]
