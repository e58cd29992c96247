"""For tests of Stepguard and of programs that use it: a framework without a framework, and a recorded event log."""

from __future__ import annotations

from stepguard.testing.engine import FakeEngine, FakeSession, FakeSupervisor
from stepguard.testing.events import RecordedEvents

__all__ = ["FakeEngine", "FakeSession", "FakeSupervisor", "RecordedEvents"]
