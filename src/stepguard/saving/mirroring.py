"""The mirror of a run: what a start takes from it, what goes into it, and its end.

The thread that opens and ends the session calls everything here but :meth:`RunMirror.committed`. Two threads belong to
it: the uploader (:mod:`stepguard.saving.uploader`) and the one that renews the lease (:mod:`stepguard.remote.lease`).
Each opens with the protocol by which it meets this one.

A start that cannot reach the mirror goes on with what the logdir has, and says so; the uploader tries again. It is
refused if the logdir has nothing: starting over at step 0 would be work on another run. So it is if the program
asks for a checkpoint that the mirror may have.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from stepguard.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError
from stepguard.options import Mirror
from stepguard.remote.copies import Copied, Copies
from stepguard.remote.history import History
from stepguard.remote.lease import Lease
from stepguard.remote.objects import RemoteError
from stepguard.remote.opening import open_remote
from stepguard.remote.pace import Pace
from stepguard.saving.retry import Backoff
from stepguard.saving.uploader import Places, Uploader
from stepguard.store import Checkpoint, CheckpointStore, FileRecord, Manifest, rollback
from stepguard.store.marks import BEST, Marked, standing
from stepguard.watching.observer import Observer
from stepguard.words import logger

_log = logger(__name__)

# How long a start tries to reach a mirror without which it has nothing to go on from.
_START_SECS = 60.0


class RunMirror:
    """The mirror of one run, for one session after the other.

    ``on_error`` gets the LogdirInUseError when another machine has taken over the mirror, in a thread of the mirror's.

    Raises ValueError for an address that no store has, ModuleNotFoundError, naming the extra, without obstore.
    """

    def __init__(
        self,
        options: Mirror,
        store: CheckpointStore,
        *,
        observer: Observer,
        on_error: Callable[[BaseException], None],
        start_secs: float = _START_SECS,
    ) -> None:
        self._options = options
        self._store = store
        self._observer = observer
        self._on_error = on_error
        self._start_secs = start_secs
        self._remote = open_remote(options.url, options.store_options)
        self._lease: Lease | None = None
        self._uploader: Uploader | None = None
        # What was said before the ledger was open.
        self._said: list[str] = []

    # --- the start ---

    def begin(self) -> None:
        """Take the lease, and what the mirror has and the logdir has not; start the uploader. For the chief.

        Raises:
            LogdirInUseError: another machine trains into this mirror.
            RemoteError: the mirror cannot be reached, and the logdir has no checkpoint; or a checkpoint that only the
                mirror has could not be fetched.
            CheckpointMismatchError: the mirror is that of another engine's program.
        """
        store = self._store
        copies = Copies(self._remote, Pace(self._options.max_bytes_per_sec))
        history = History(Path(store.root), self._remote, copies.pace)
        self._lease = lease = Lease(
            self._remote, Path(os.path.abspath(store.root)), lease_secs=self._options.lease_secs, on_lost=self._on_error
        )
        try:
            found = self._reached(lease, copies, history)
            if isinstance(found, OSError):
                store.spare = _OutOfReach(store, self._remote.url, found)
            else:
                spare = _Spare(store, copies, found, self._say)
                spare.bring(next((one for one in store.candidates() if one.is_committed), None))
                store.spare = spare
            places = Places(store, copies, history, lease)
            self._uploader = Uploader(places, self._options, observer=self._observer, on_lost=self._on_error)
        except BaseException:
            self.leave(0.0)
            raise

    def _reached(self, lease: Lease, copies: Copies, history: History) -> list[Copied] | OSError:
        """The checkpoints in the mirror; the error if it cannot be reached and the logdir has some."""
        has_none_here = not self._store.candidates()
        retry = Backoff(self._start_secs if has_none_here else 0.0)
        began, tries = time.monotonic(), 0
        while True:
            try:
                if not lease.is_settled:
                    lease.acquire()
                for key in history.fetch():
                    _log.info("mirror %s: fetched %s", self._remote.url, key)
                return copies.listed(basename=self._store.basename)
            except (RemoteError, FileNotFoundError) as error:
                tries += 1
                wait_secs = retry(tries, time.monotonic() - began)
                if wait_secs is None and has_none_here:
                    raise
                if wait_secs is None:
                    self._say(
                        f"mirror {self._remote.url}: it cannot be reached ({error}), so this start goes on with what "
                        f"the logdir has; whether another machine has gone on with the run is not known"
                    )
                    return error
                copies.pace.wait(wait_secs)
                self._remote.reopen()

    def _say(self, message: str) -> None:
        _log.warning("%s", message)
        self._said.append(message)

    # --- the run ---

    def trains(self) -> None:
        """Note in the ledger, which is open now, what the start has said."""
        said, self._said = self._said, []
        for message in said:
            self._observer.warn(message)

    @property
    def is_uploading(self) -> bool:
        """Whether something is being sent, and not only tried again. Any thread."""
        uploader = self._uploader
        return uploader is not None and uploader.is_sending

    def committed(self, name: str) -> None:
        """Have the checkpoint ``name`` copied. Writer thread; returns at once."""
        if self._uploader is not None:
            self._uploader.committed(name)

    def marked(self, name: str) -> None:
        """Have the new marks of the checkpoint ``name`` copied. Writer thread; returns at once."""
        if self._uploader is not None:
            self._uploader.marked(name)

    def finish(self, deadline: float) -> None:
        """Wait until the last checkpoint is in the mirror, at most until ``deadline`` (monotonic); say if it is not."""
        uploader = self._uploader
        if uploader is None or uploader.finish(deadline):
            return
        left, error = uploader.left, uploader.error
        what = "the mirror was not looked at yet" if left is None else f"{left} is not there yet"
        why = "the time to stop is over" if error is None else error
        message = (
            f"mirror {self._remote.url}: {what} ({why}). It is safe in {self._store.root}; the next start there sends "
            f"it, and so does `stepguard push {self._store.root} {self._remote.url}`"
        )
        _log.warning("%s", message)
        self._observer.warn(message)

    def leave(self, within_secs: float) -> None:
        """Send the end of the ledger, end the threads, and give the lease back: in about ``within_secs``."""
        self._store.spare = None
        uploader, self._uploader = self._uploader, None
        lease, self._lease = self._lease, None
        if uploader is not None:
            uploader.close(within_secs)
        if lease is not None:
            lease.release()


class _OutOfReach:
    """The second copy while ``error`` keeps it out of reach: it mends nothing, and may have what is asked for."""

    def __init__(self, store: CheckpointStore, url: str, error: OSError) -> None:
        self._store = store
        self._url = url
        self._error = error

    def mend(self, damaged: Checkpoint) -> bool:
        """Return ``False``, and say why."""
        _log.info("%s: not mended from %s: %s", damaged.path, self._url, self._error)
        return False

    def bring(self, than: Checkpoint | None) -> bool:
        """Return ``False``, and say why."""
        _log.info("nothing newer than %s is taken from %s: %s", than and than.name, self._url, self._error)
        return False

    def bring_asked(self, asked: int | str) -> None:
        """Raise RemoteError unless ``asked`` is a step that is here: going on from another would be another run."""
        if isinstance(asked, int) and any(one.step == asked for one in self._store.candidates()):
            return
        raise RemoteError(
            f"{self._url}: expected to find out whether the checkpoint {asked!r} that the program asks for is there, "
            f"and it cannot be reached ({self._error}). Nothing was changed. Start again when it can be reached",
            url=self._url,
        ) from self._error


class _Spare:
    """What a search in the logdir takes from the mirror; see :class:`stepguard.store.recovery.Spare`."""

    def __init__(self, store: CheckpointStore, copies: Copies, found: list[Copied], say: Callable[[str], None]) -> None:
        self._store = store
        self._copies = copies
        self._found = found
        self._say = say
        self._tried: set[str] = set()

    def mend(self, damaged: Checkpoint) -> bool:
        """Fetch the damaged files of a checkpoint; if its manifest is damaged, the whole of it."""
        if not any(one.name == damaged.name for one in self._found):
            return False
        try:
            mended = self._store.mend(damaged, self._fetch)
        except CheckpointError as error:
            _log.debug("%s: not mended file by file: %s", damaged.path, error)
            return self._fetch_again(damaged)
        except OSError as error:
            self._say(f"{damaged.path} is damaged, and could not be repaired from {self._copies.url}: {error}")
            return False
        if mended:
            self._say(f"{damaged.path} was damaged ({', '.join(mended)}): repaired from {self._copies.url}")
        return bool(mended)

    def _fetch(self, record: FileRecord, path: Path) -> None:
        self._copies.fetch_file(record, path)

    def _fetch_again(self, damaged: Checkpoint) -> bool:
        """Replace a checkpoint whose manifest is damaged, or whose files the mirror does not have as they were."""
        copied = next(one for one in self._found if one.name == damaged.name)
        if copied.name in self._tried:
            return False
        self._tried.add(copied.name)
        return self._taken(copied, f"{damaged.path} was damaged: replaced by that of {self._copies.url}")

    def bring(self, than: Checkpoint | None) -> bool:
        """Fetch and commit the newest checkpoint of the mirror that is newer than ``than`` and not here.

        Raises RemoteError if it could not be fetched: going on from an older one would be another run.
        """
        here = {one.name for one in self._store.candidates()}
        for copied in self._found:
            if copied.name in self._tried or (copied.name in here and than is not None):
                continue
            manifest = self._manifest(copied)
            if manifest is None or not _is_newer(manifest, than) or self._is_given_up(manifest.step, manifest.time):
                continue
            self._tried.add(copied.name)
            if self._taken(copied, "", manifest):
                _log.info("took step %s from the mirror %s", copied.step, self._copies.url)
                return True
        return False

    def bring_asked(self, asked: int | str) -> None:
        """Fetch and commit the checkpoint of a step, the best, or one by its name, if the mirror alone has it.

        Raises RemoteError if it could not be fetched: going on from another would be another run.
        """
        here = self._store.candidates()
        names = {one.name for one in here}
        if isinstance(asked, int) and any(one.step == asked for one in here):
            return
        there = {one.name: one for one in self._found if one.name not in names}
        if isinstance(asked, int):
            there = {name: one for name, one in there.items() if one.step == asked}
        manifests = {name: self._manifest(one) for name, one in there.items()}
        self._check_known(asked, [there[name] for name, one in manifests.items() if one is None])
        known = {
            name: one
            for name, one in manifests.items()
            if one is not None and not self._is_given_up(one.step, one.time)
        }
        meant = next(iter(known), None) if isinstance(asked, int) else self._meant(asked, here, known.values())
        if meant is None or meant not in known:
            return
        self._tried.add(meant)
        if self._taken(there[meant], "", known[meant]):
            _log.info("took step %s from the mirror %s", there[meant].step, self._copies.url)
            # A kill before the rollback must not leave the run at this step.
            for newest in here[:1]:
                self._store.point_to(newest)

    def _meant(self, asked: str, here: Iterable[Checkpoint], there: Iterable[Manifest]) -> str | None:
        """The name of the checkpoint that ``asked`` means among those in both places."""
        found = list(there)
        for one in here:
            with contextlib.suppress(CheckpointError, OSError):
                if (manifest := self._store.read_manifest(one)) is not None:
                    found.append(manifest)
        known = standing([Marked(one.name, one.step, one.time, one.marks) for one in found], self._store.pins.rule)
        return next(iter(known.best), None) if asked == BEST else known.holders.get(asked, asked)

    def _check_known(self, asked: int | str, damaged: Iterable[Copied]) -> None:
        """Raise CheckpointCorruptError if one with a damaged manifest may be the one that is asked for."""
        for one in damaged:
            if not self._is_given_up(one.step, one.modified):
                raise CheckpointCorruptError(
                    f"{self._copies.url}/{one.name}: its manifest cannot be read, and it may be the checkpoint "
                    f"{asked!r} that the program asks for. Nothing was changed. Put a good copy back, ask for another "
                    f"step, or remove this checkpoint from the mirror",
                    path=Path(self._copies.url) / one.name,
                )

    def _is_given_up(self, step: int | None, committed_at: float) -> bool:
        """Whether a rollback has put the run back to before a checkpoint: one of that name here is put aside."""
        last = rollback.read(self._store.root)
        return last is not None and last.gives_up(step, committed_at)

    def _manifest(self, copied: Copied) -> Manifest | None:
        try:
            return self._copies.manifest(copied.name)
        except (CheckpointCorruptError, FileNotFoundError) as error:
            self._tried.add(copied.name)
            self._say(f"mirror {self._copies.url}: {copied.name} is damaged there: {error}")
            return None

    def _taken(self, copied: Copied, message: str, manifest: Manifest | None = None) -> bool:
        """Fetch a checkpoint into a stage, verify it, and commit it; ``False`` if it is damaged in the mirror."""
        manifest = self._manifest(copied) if manifest is None else manifest
        if manifest is None:
            return False
        if manifest.engine != self._store.engine:
            raise CheckpointMismatchError(
                f"{self._copies.url}: expected checkpoints of the engine {self._store.engine!r}, found one of "
                f"{manifest.engine!r}: another program's run is there. Nothing was changed. Give this run a mirror of "
                f"its own",
                path=Path(self._copies.url),
            )
        # The commit writes the state file anew: it must name what the run before owned, or that is never pruned.
        self._store.pins.load(self._store.candidates())
        self._store.adopt(self._store.listed_by_state())
        stage = self._store.stage(copied.name)
        try:
            digests = self._copies.fetch(manifest, stage)
            self._store.commit(
                copied.name,
                manifest.step,
                extra=manifest.extra,
                digests=digests,
                taken_at=manifest.time,
                marks=manifest.marks,
            )
        except CheckpointCorruptError as error:
            self._say(f"mirror {self._copies.url}: {copied.name} is damaged there: {error}")
            return False
        finally:
            with contextlib.suppress(OSError):
                self._store.discard(stage)
        if message:
            self._say(message)
        return True


def _is_newer(manifest: Manifest, than: Checkpoint | None) -> bool:
    if than is None:
        return True
    steps = [-1 if step is None else step for step in (manifest.step, than.step)]
    return steps[0] > steps[1] or (steps[0] == steps[1] and manifest.time > than.time)
