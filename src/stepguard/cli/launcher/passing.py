"""Which signal a program gets for one that the launcher got: that one, if it handles it, or else a request to stop.

A signal that a program does not handle would kill it, and the steps since its last checkpoint with it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from stepguard.disk.system import handled_signals

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send some time before the end of a job, once or more often."""


def passed_on(number: int, pid: int, answered: Sequence[int]) -> int:
    """The signal for the program ``pid`` on behalf of ``number``. ``answered`` are those at which it says it stops.

    A process in between, such as a shell or torchrun, says nothing. It gets SIGTERM for SIGUSR1 and SIGUSR2 that it
    does not handle, and what else the launcher got unchanged.
    """
    if number in answered or number in (handled_signals(pid) or ()):
        return number
    if answered:
        return signal.SIGTERM if signal.SIGTERM in answered else answered[0]
    return signal.SIGTERM if number in WARNINGS else number


def is_request(number: int, sent: int, answered: Sequence[int]) -> bool:
    """Whether a warning of a scheduler, passed on as ``sent``, asks the program to stop."""
    return number in WARNINGS and (sent != number or number in answered)
