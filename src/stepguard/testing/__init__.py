"""For tests of Stepguard and of programs that use it: a fake engine, and an event log that records its calls."""

from __future__ import annotations

from stepguard.testing.engine import FakeEngine, FakeSession, FakeSupervisor
from stepguard.testing.events import RecordedEvents

__all__ = ["FakeEngine", "FakeSession", "FakeSupervisor", "RecordedEvents"]
