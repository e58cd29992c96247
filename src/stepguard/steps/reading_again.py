"""Reads the batches of an epoch again that were seen before a restart, and reports how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from stepguard.words import duration, logger

_log = logger(__name__)

# A reading that takes longer is reported by a warning, because standard logging shows nothing less; then at intervals.
_SLOW_SECS = 5.0
_REPORT_SECS = 30.0

_END = object()


def read_again(
    iterator: Iterator[Any], number: int, shown: str, go_on: Callable[[], bool], on_read: Callable[[], None]
) -> tuple[int, Any]:
    """Read ``number`` batches; return how many there were before the end, and the last of them.

    ``go_on`` is asked before each batch whether to read on, and ``on_read`` called after each.
    """
    _log.info("%s: reading %d batches that were seen before the restart, and dropping them", shown, number)
    began = time.monotonic()
    report_at = began + _SLOW_SECS
    batch = None
    for read in range(number):
        if not go_on():
            return read, batch
        found = next(iterator, _END)
        if found is _END:
            return read, batch
        batch = found
        on_read()
        now = time.monotonic()
        if now >= report_at:
            rate = (read + 1) / (now - began)
            _log.warning(
                "%s: reading again what was seen before the restart: %d of %d batches, %.3g a second, %s left. A data "
                "set or loader with state_dict and load_state_dict is not read again",
                shown,
                read + 1,
                number,
                rate,
                duration((number - read - 1) / rate),
            )
            report_at = now + _REPORT_SECS
    _log.info("%s: read %d batches again in %.1f s", shown, number, time.monotonic() - began)
    return number, batch
