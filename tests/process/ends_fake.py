"""``python ends_fake.py STATE LOGDIR``: end in one of the states of ``states_at_end.py``, on the fake engine."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import types

import states_at_end

from stepguard import Stopping
from stepguard.testing import FakeSession, FakeSupervisor

if importlib.util.find_spec("xxhash") is None:
    # A Python that has not what we depend on ends all the same; what it writes here is read by nobody else.
    stand_in = types.ModuleType("xxhash")
    stand_in.xxh3_128 = hashlib.md5  # type: ignore[attr-defined]
    stand_in.xxh3_128_hexdigest = lambda content: hashlib.md5(content).hexdigest()  # type: ignore[attr-defined]
    sys.modules["xxhash"] = stand_in

if __name__ == "__main__":
    sv = FakeSupervisor(
        sys.argv[2], save_model_secs=0.01, save_summaries_secs=0.01, stopping=Stopping(stop_grace_secs=6)
    )
    states_at_end.end(sys.argv[1], sv, sv.prepare_or_wait_for_session, sv.managed_session, FakeSession.run_step)
