"""The lease: one machine at a time writes to a mirror, and so trains the run that it belongs to.

The protocol: the chief of a logdir writes the object ``.stepguard.lease`` with its host, its process id, its logdir and
a random id, by a conditional create, and rewrites it every third of ``lease_secs``, each time on the condition that
the object still has the tag of its own last write. Two machines can therefore never both succeed, whatever their clocks
say. Who finds the object of another one waits until it has been rewritten (then the other lives: LogdirInUseError), or
has not been for ``lease_secs`` of this machine's own monotonic clock (then it is taken over, again on condition of
its tag). It does not wait where there is nothing to wait for: for a lease that was given back, for one of its own
logdir on its own host (the chief's lock there says that the process has ended), or for one whose last write lies ten
times ``lease_secs`` back. A wait has an end, and nobody holds a lock meanwhile, so no circle of waits exists.

A kill leaves the object, which is taken over as above. A machine that was cut off, and comes back after another has
taken over, is refused its next rewrite: it sends nothing more, and its run ends with LogdirInUseError. Before each
manifest the lease must have been rewritten within ``lease_secs``, so that a machine that was suspended asks first.

A store that ignores conditions would let two machines write. It is found out at the start: a second create of the same
object must be refused there. Where it is not, or the store says that it has none, that is said, and no lease is kept.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from stepguard.disk import schema
from stepguard.errors import LogdirInUseError
from stepguard.remote.objects import (
    ConditionError,
    NoConditionsError,
    Remote,
    RemoteError,
    RemoteObject,
    read_whole,
)
from stepguard.words import logger

_log = logger(__name__)

KEY = ".stepguard.lease"
_MOST_BYTES = 4096
# An older lease than so many times its duration is not waited for. Clocks do not differ by that much.
_LONG_GONE = 10
_LOOK_SECS = 1.0
_GIVING_SECS = 3.0


@dataclass(frozen=True, slots=True)
class _Holder:
    """The content of the object. ``renewed`` counts, so that each rewrite has other bytes, and so another tag."""

    id: str
    host: str
    pid: int
    logdir: str
    since: float
    renewed: int = 0
    is_given_back: bool = False

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Lease:
    """The lease of one mirror for the run in ``logdir``.

    Threads: :meth:`acquire` and :meth:`release` by the thread that opens and ends the run; a thread of its own renews
    it, and calls ``on_lost`` with the LogdirInUseError, once; :meth:`check` by the thread that sends.
    """

    def __init__(
        self, remote: Remote, logdir: Path, *, lease_secs: float, on_lost: Callable[[LogdirInUseError], None]
    ) -> None:
        self._remote = remote
        self._logdir = logdir
        self._lease_secs = lease_secs
        self._on_lost = on_lost
        self._writing = threading.Lock()
        self._holder: _Holder | None = None
        self._tag: str | None = None
        self._renewed_at = 0.0
        self._has_none = False
        self._lost: LogdirInUseError | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the place was asked: this process has the lease, or there is none to have."""
        return self._holder is not None or self._has_none

    def acquire(self) -> bool:
        """Get the lease; ``False``, after a warning, if the place has no conditional writes.

        Raises LogdirInUseError if another machine has it, RemoteError if the place cannot be asked.
        """
        mine = _Holder(uuid.uuid4().hex, os.uname().nodename, os.getpid(), str(self._logdir), time.time())
        try:
            tag = self._taken(mine)
            self._try_again(mine)
        except NoConditionsError as error:
            _log.warning(
                "mirror %s: it has no conditional writes (%s), so nothing keeps two machines from training one run: "
                "make sure that only one does",
                self._remote.url,
                error,
            )
            self._has_none = True
            return False
        self._holder, self._tag, self._renewed_at = mine, tag, time.monotonic()
        self._lost = None
        self._end.clear()
        self._thread = threading.Thread(target=self._keep, name="stepguard-mirror-lease", daemon=True)
        self._thread.start()
        return True

    def _taken(self, mine: _Holder) -> str | None:
        while True:
            try:
                return self._remote.create(KEY, mine.encoded())
            except ConditionError:
                pass
            found = self._remote.head(KEY)
            if found is None:
                continue
            other = self._read()
            if not self._is_free(found, other):
                self._wait(found, other)
            try:
                return self._remote.replace(KEY, mine.encoded(), found.tag)
            except ConditionError:
                # Somebody else has taken it over at the same time, and lives.
                raise self._in_use(self._read()) from None

    def _try_again(self, mine: _Holder) -> None:
        """Raise NoConditionsError if the place does not refuse what it should."""
        try:
            self._remote.create(KEY, mine.encoded())
        except ConditionError:
            return
        raise NoConditionsError("it ignores the condition of a write", url=self._remote.url)

    def _read(self) -> _Holder | None:
        """The holder that the object names. What somebody has put there by hand names none, and is waited for too."""
        found = self._remote.head(KEY)
        if found is None or found.size > _MOST_BYTES:
            return None
        try:
            content = read_whole(self._remote, KEY, most=_MOST_BYTES)
            kinds = schema.kinds_of(_Holder)
            return _Holder(**schema.checked(schema.parse(content), kinds, required=tuple(kinds)))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _is_free(self, found: RemoteObject, other: _Holder | None) -> bool:
        if other is not None and other.is_given_back:
            return True
        if other is not None and (other.host, other.logdir) == (os.uname().nodename, str(self._logdir)):
            return True
        return time.time() - found.modified > _LONG_GONE * self._lease_secs

    def _wait(self, found: RemoteObject, other: _Holder | None) -> None:
        """Wait until the lease has not been rewritten for its duration. Raises LogdirInUseError if it is."""
        deadline = time.monotonic() + self._lease_secs
        _log.info("mirror %s: waiting whether %s still trains", self._remote.url, _told(other))
        while (left := deadline - time.monotonic()) > 0:
            self._end.wait(min(left, _LOOK_SECS))
            now = self._remote.head(KEY)
            if now is None:
                return
            if now.tag != found.tag:
                holder = self._read()
                if holder is not None and holder.is_given_back:
                    return
                raise self._in_use(holder)

    def _in_use(self, other: _Holder | None) -> LogdirInUseError:
        return LogdirInUseError(
            f"{self._remote.url}: expected no other chief of this mirror, found {_told(other)}; stop it, or give this "
            f"run another mirror",
            logdir=self._logdir,
            host=None if other is None else other.host,
            pid=None if other is None else other.pid,
            since=None if other is None else other.since,
        )

    # --- keeping it ---

    def _keep(self) -> None:
        while not self._end.wait(self._lease_secs / 3):
            try:
                self._renew()
            except LogdirInUseError as error:
                self._on_lost(error)
                return
            except RemoteError as error:
                _log.info("mirror %s: the lease could not be renewed, and is tried again: %s", self._remote.url, error)

    def _renew(self) -> None:
        with self._writing:
            holder = self._holder
            if holder is None or self._lost is not None:
                return
            self._holder = holder = _Holder(**{**asdict(holder), "renewed": holder.renewed + 1})
            began = time.monotonic()
            try:
                self._tag = self._remote.replace(KEY, holder.encoded(), self._tag)
                self._renewed_at = began
                return
            except (ConditionError, FileNotFoundError):
                other = self._read()
            if other is not None and other.id == holder.id and not other.is_given_back:
                # Our own write had arrived, and its answer had not.
                found = self._remote.head(KEY)
                self._tag, self._renewed_at = None if found is None else found.tag, began
                return
            self._lost = self._in_use(other)
        raise self._lost

    def check(self) -> None:
        """Make sure that the lease is still ours. Raises LogdirInUseError if not, RemoteError if that is not known."""
        if self._lost is not None:
            raise self._lost
        if self._holder is not None and time.monotonic() - self._renewed_at > self._lease_secs * 0.9:
            self._renew()

    def release(self) -> None:
        """Give the lease back, if the place answers within a moment. Repeated calls do nothing."""
        self._end.set()
        self._thread = None
        # A network that hangs would hold the end of the run. Whoever comes next then waits for the lease to run out.
        giving = threading.Thread(target=self._give_back, name="stepguard-mirror-lease-end", daemon=True)
        try:
            giving.start()
        except RuntimeError:
            self._give_back()  # Python 3.12 and later start no threads while the process exits.
        else:
            giving.join(_GIVING_SECS)

    def _give_back(self) -> None:
        with self._writing:
            holder, self._holder = self._holder, None
            if holder is None or self._lost is not None:
                return
            given = _Holder(**{**asdict(holder), "renewed": holder.renewed + 1, "is_given_back": True})
            try:
                self._remote.replace(KEY, given.encoded(), self._tag)
            except (RemoteError, FileNotFoundError) as error:
                _log.info("mirror %s: the lease could not be given back: %s", self._remote.url, error)


def _told(holder: _Holder | None) -> str:
    if holder is None:
        return "another machine"
    since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(holder.since))
    return f"process {holder.pid} on {holder.host} with the logdir {holder.logdir}, since {since}"
