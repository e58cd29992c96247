"""What is due after so many steps is done, whichever threads do them."""

from __future__ import annotations

import threading

from stepguard.steps.boundary import Boundary

SOON_SECS = 60.0


class Overtaken(Boundary):
    """One thread is overtaken by another between the end of its step and the look at what is due after it."""

    def __init__(self) -> None:
        super().__init__()
        self.slow: threading.Thread | None = None
        self.has_arrived, self.may_look = threading.Event(), threading.Event()

    def call_due(self) -> None:
        if threading.current_thread() is self.slow:
            self.has_arrived.set()
            assert self.may_look.wait(SOON_SECS)
        super().call_due()


def run_step(boundary: Boundary) -> None:
    boundary.enter()
    boundary.leave()


def test_a_step_of_another_thread_before_the_look_does_not_end_the_callbacks_for_good():
    boundary, called_at = Overtaken(), []
    boundary.call_after_steps(1, lambda: called_at.append(boundary.steps) or 1)
    boundary.slow = threading.Thread(target=run_step, args=(boundary,))
    boundary.slow.start()
    assert boundary.has_arrived.wait(SOON_SECS)

    run_step(boundary)
    boundary.may_look.set()
    boundary.slow.join(SOON_SECS)
    run_step(boundary)

    assert called_at == [2, 3]
