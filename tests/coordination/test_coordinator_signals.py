"""The coordinator in signal handlers, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest


def run_program(program: str, *, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HAMMER = """
    import signal, threading, time
    from stepguard.coordination.coordinator import Coordinator

    coord = Coordinator()
    signals = []

    def strike(*_):
        signals.append(None)
        coord.should_stop()
        coord.request_stop()
        coord.wait_for_stop(0.01)

    signal.signal(signal.SIGALRM, strike)
    # The interpreter looks for signals between two bytecodes: many strikes, each somewhere else in the loop's methods.
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    deadline = time.monotonic() + 3
    rounds = 0
    while time.monotonic() < deadline or len(signals) <= 300:
        rounds += 1
        {work}
    signal.setitimer(signal.ITIMER_REAL, 0, 0)
    print("survived", rounds)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize(
    "work",
    [
        "coord.request_stop(); coord.clear_stop(); coord.should_stop(); coord.wait_for_stop(0)",
        "coord.clear_stop(); coord.wait_for_stop(5)",
        "coord.request_stop(ValueError('x')); coord.clear_stop(); coord.wait_for_stop(0.0001)",
        "coord.clear_stop(); each = threading.Thread(target=coord.wait_for_stop); each.start(); coord.join([each])",
    ],
    ids=["request", "wait", "request-with-error", "join"],
)
def test_a_signal_handler_may_request_a_stop_at_any_moment(work: str) -> None:
    assert "survived" in run_program(HAMMER.format(work=work))


def test_a_signal_handler_ends_a_wait_without_a_timeout() -> None:
    program = """
        import signal, time
        from stepguard.coordination.coordinator import Coordinator

        coord = Coordinator()
        signal.signal(signal.SIGALRM, lambda *_: coord.request_stop())
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert coord.wait_for_stop()
        print("woken")
    """
    assert run_program(program).strip() == "woken"


def test_ctrl_c_ends_a_join() -> None:
    program = """
        import os, signal, threading
        from stepguard.coordination.coordinator import Coordinator

        coord = Coordinator()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            coord.join([threading.Thread(target=coord.wait_for_stop, daemon=True)])
            lazy = threading.Thread(target=coord.wait_for_stop, daemon=True)
            lazy.start()
            coord.join([lazy])
        except KeyboardInterrupt:
            print("interrupted")
    """
    assert run_program(program).strip() == "interrupted"
