"""How runs are asked to stop, and what they end with: signals, reasons, exit codes, and the end of a job's time.

The words here are those of the ledger, of ``Stopping(exit_codes=...)``, of ``stepguard status`` and ``stepguard run``.
"""

from __future__ import annotations

import math
import numbers
import os
import signal
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from stepguard.words import logger

_log = logger(__name__)

FINISHED = "finished"
ERROR = "error"
STOPPED = "stopped"
TIME_LIMIT = "time_limit"
COMMAND = "command"

REASON_OF = {
    signal.SIGTERM: "sigterm",
    signal.SIGUSR1: "sigusr1",
    signal.SIGUSR2: "sigusr2",
    signal.SIGINT: "interrupt",
}
"""The signals that a run can take for requests to stop, and their words."""
# Nothing that is not asked for would expect SIGUSR1 to kill a run, which is its default action, and Slurm sends it as a
# warning. SIGUSR2 belongs to the program until it is given, and Ctrl-C to Python.
DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

REQUESTS = frozenset({*REASON_OF.values(), "request_stop", TIME_LIMIT, COMMAND, "trial"})
"""The reasons of a requested stop, after which a run has neither finished nor failed."""
PREEMPTING = frozenset(REASON_OF.keys() - {signal.SIGINT})
"""The signals that schedulers send."""
PREEMPTIONS = frozenset({*(REASON_OF[one] for one in PREEMPTING), TIME_LIMIT})
"""The requests after which the run is to go on elsewhere or later: not the user's own, nor the program's."""

STOPPED_EXIT = 75
"""What `stepguard run` ends with when a run was preempted and ended with 0: EX_TEMPFAIL of sysexits.h, "try again"."""

SLURM = "slurm"
_END_OF_JOB = "SLURM_JOB_END_TIME"
_JOB = "SLURM_JOB_ID"


def as_signals(name: str, given: Any) -> tuple[signal.Signals, ...]:
    """The signals in ``given``, without duplicates, in their order.

    Raises:
        TypeError: ``given`` is no collection of signals.
        ValueError: a run cannot stop on one of them.
    """
    expected = f"a collection of signals, of {', '.join(f'signal.{one.name}' for one in REASON_OF)}"
    if isinstance(given, (str, bytes, int)) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be {expected}, got {type(given).__name__}: {given!r:.80}")
    found = list(given)
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{name} must be {expected}, got {type(one).__name__}: {one!r:.80}")
        if one not in REASON_OF:
            raise ValueError(f"{name} must be {expected}, got {one!r}")
    return tuple(dict.fromkeys(signal.Signals(one) for one in found))


def check_exit_codes(name: str, codes: Any) -> None:
    """Raise unless ``codes`` maps words for ends of a run to exit codes from 0 to 255.

    Raises:
        TypeError: it is no mapping, or a code is no whole number.
        ValueError: a word is unknown, a code out of range, or an error would look like success.
    """
    words = (FINISHED, STOPPED, ERROR, *sorted(REQUESTS - {"trial"}))
    expected = f"a mapping from some of {', '.join(words)} to exit codes from 0 to 255"
    if not isinstance(codes, Mapping):
        raise TypeError(f"{name} must be {expected}, got {type(codes).__name__}: {codes!r:.80}")
    for word, code in codes.items():
        if word not in words:
            raise ValueError(f"{name} must be {expected}, got {word!r:.80}")
        if isinstance(code, bool) or not isinstance(code, numbers.Integral):
            raise TypeError(f"{name}[{word!r}] must be a whole number from 0 to 255, got {code!r:.80}")
        if not 0 <= int(code) <= 255:
            raise ValueError(f"{name}[{word!r}] must be a whole number from 0 to 255, got {code}")
        if word == ERROR and int(code) == 0:
            raise ValueError(f"{name}['error'] must be a whole number from 1 to 255, got 0, which means success")


def exit_code_of(codes: Mapping[str, int], reason: str) -> int | None:
    """The exit code that ``codes`` have for the end of a run by ``reason``; ``None`` if they have none."""
    code = codes.get(reason)
    if code is None and reason in REQUESTS:
        code = codes.get(STOPPED)
    return None if code is None else int(code)


def check_end(name: str, at: Any) -> None:
    """Raise unless ``at`` is a time: Unix seconds, a datetime, ``"slurm"`` or ``None``.

    Raises:
        TypeError, ValueError: it is none.
    """
    expected = "a number of Unix seconds, a datetime, 'slurm' or None"
    if isinstance(at, str):
        if at != SLURM:
            raise ValueError(f"{name} must be {expected}, got {at!r:.80}")
    elif isinstance(at, bool) or not isinstance(at, (numbers.Real, datetime, type(None))):
        raise TypeError(f"{name} must be {expected}, got {type(at).__name__}: {at!r:.80}")
    elif isinstance(at, numbers.Real) and not math.isfinite(at):
        raise ValueError(f"{name} must be {expected}, got {at}")


def end_time(at: float | datetime | str | None, environment: Mapping[str, str] = os.environ) -> float | None:
    """The end that ``at`` means, in Unix seconds; ``None`` if there is none.

    ``"slurm"`` is the end of the Slurm job that this process is in, from ``SLURM_JOB_END_TIME``, which newer
    versions of Slurm set. Outside a job there is no end. Inside, a missing or unreadable variable causes a warning.
    """
    if not isinstance(at, str):
        return at.timestamp() if isinstance(at, datetime) else None if at is None else float(at)
    found = environment.get(_END_OF_JOB, "")
    if found.isascii() and found.isdigit():
        return float(found)
    if environment.get(_JOB):
        _log.warning(
            "at='slurm': expected the end of job %s in %s, as Unix seconds, found %s: the run has no time limit; "
            'set it in the job script: export %s=$(date -d "$(squeue -h -j $SLURM_JOB_ID -o %%e)" +%%s)',
            environment[_JOB],
            _END_OF_JOB,
            repr(found) if found else "nothing",
            _END_OF_JOB,
        )
    return None
