"""A loop that the end of another process stops: what was not trained is told."""

from __future__ import annotations

import pytest
from plain_session import plain_session

from stepguard.coordination.coordinator import Coordinator
from stepguard.steps.gate import Gate, Moment


@pytest.mark.parametrize(
    ("stopped_after", "reason", "is_told"), [(2, None, True), (3, None, False), (2, "sigterm", False)]
)
def test_batches_that_are_left_are_told_of(stopped_after, reason, is_told, caplog):
    gate, coord = Gate(), Coordinator()
    session = plain_session(coord, gate)
    trained = []
    for batch in session.steps(["a", "b", "c"], epochs=1):
        trained.append(batch)
        if len(trained) == stopped_after:
            # As the rendezvous does when the chief has come to its end, or was asked to stop.
            coord.end() if reason is None else coord.ask_stop(reason)
            gate.open_until(Moment(0, 0, stopped_after), is_last=True)
    session.close()

    assert trained == ["a", "b", "c"][:stopped_after]
    assert ("stopped after step 2, because another process has come to its end" in caplog.text) == is_told
