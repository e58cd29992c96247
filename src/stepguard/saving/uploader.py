"""The uploader thread: copies committed checkpoints into the mirror while training goes on.

The protocol: the writer's thread puts the name of each checkpoint that it has committed into the one place
``_waiting``, over one that still waits there: that one was overtaken, and is skipped. It never waits itself. The
uploader's thread takes the name, sends the checkpoint, and tries again with growing pauses when the place fails; a
newer commit, or the end of the run, ends such a pause. It holds the files of the checkpoint open from the first byte,
so that pruning here cannot take them away. :meth:`Uploader.finish` waits on the same condition until nothing waits, at
most until its deadline; :meth:`Uploader.close` then sends the history once more, gives up what is still being sent,
and waits for nothing that the network could hold. The lock of the condition is never held during a transfer, so no
circle of waits exists. A kill at any point leaves objects without a manifest in the mirror, which the next chief
sweeps.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stepguard.disk.system import yield_to_others
from stepguard.errors import CheckpointCorruptError, CheckpointError, LogdirInUseError, described
from stepguard.options import Mirror
from stepguard.remote import record as records
from stepguard.remote.copies import Copied, Copies
from stepguard.remote.history import History
from stepguard.remote.lease import Lease
from stepguard.remote.pace import StoppedError
from stepguard.remote.record import MirroredCheckpoint
from stepguard.saving.retry import Backoff, Retry
from stepguard.store import Checkpoint, CheckpointStore, Manifest, rollback
from stepguard.store.marks import Marked, standing
from stepguard.watching.observer import Observer
from stepguard.words import logger

_log = logger(__name__)

_LAST_SECS = 5.0
_GIVING_UP_SECS = 1.0
# Of checkpoints in the mirror that the record in the logdir and the state file there name, the newest: both are written
# anew for each.
_MOST_TOLD = 200


@dataclass(frozen=True, slots=True)
class Places:
    """What an uploader works with: the store of the logdir, the copies and the history in the mirror, and the lease."""

    store: CheckpointStore
    copies: Copies
    history: History
    lease: Lease


class Uploader:
    """Sends the newest committed checkpoint of a run, from a thread of its own, which the constructor starts.

    Threads: :meth:`committed` and :meth:`marked` from the writer's thread; :meth:`finish` and :meth:`close` from the
    thread that ends the run; ``on_lost`` is called from the uploader's, with the LogdirInUseError, when another machine
    has the lease.
    """

    def __init__(
        self,
        places: Places,
        options: Mirror,
        *,
        observer: Observer,
        on_lost: Callable[[LogdirInUseError], None],
        retry: Retry | None = None,
    ) -> None:
        self._places = places
        self._options = options
        self._observer = observer
        self._on_lost = on_lost
        self._retry = Backoff(math.inf) if retry is None else retry
        self._url = places.copies.url
        self._wake = threading.Condition(threading.Lock())
        # `_waiting` is taken by the thread; `_sending` is set until it is done or given up.
        self._waiting: str | None = None
        self._sending: str | None = None
        # The last that was committed, and those whose marks have changed since they were sent.
        self._newest: str | None = None
        self._marked: set[str] = set()
        self._is_looking = True
        self._is_pausing = False
        self._is_closing = False
        self._is_done = False
        self._is_over = False
        self._error: str | None = None
        self._mirrored: dict[str, Manifest] = {}
        self._known: list[Copied] = []
        self.skipped = 0
        self._thread = threading.Thread(target=self._run, name="stepguard-uploader", daemon=True)
        self._thread.start()

    def committed(self, name: str) -> None:
        """Have the checkpoint ``name`` copied, in place of an older one that still waits."""
        with self._wake:
            if self._waiting is not None:
                self.skipped += 1
            self._waiting = self._newest = name
            self._wake.notify_all()

    def marked(self, name: str) -> None:
        """Have the manifest of the checkpoint ``name`` copied again, whose marks have changed. Writer thread."""
        with self._wake:
            self._marked.add(name)
            # With the newest, which is tried until it is done, and is not sent again if it is there.
            self._waiting = self._waiting or self._newest
            self._wake.notify_all()

    def finish(self, deadline: float) -> bool:
        """Wait until nothing waits to be sent, at most until ``deadline`` (monotonic); return whether that is so."""
        with self._wake:
            return self._wake.wait_for(self._is_idle, max(0.0, deadline - time.monotonic()))

    def _is_idle(self) -> bool:
        return self._is_over or (not self._is_looking and self._waiting is None and self._sending is None)

    @property
    def is_sending(self) -> bool:
        """Whether the mirror is at work: not if nothing waits, and not between two tries. Any thread."""
        with self._wake:
            return not self._is_idle() and not self._is_pausing

    @property
    def left(self) -> str | None:
        """The checkpoint that is not in the mirror yet."""
        with self._wake:
            return self._waiting or self._sending

    @property
    def error(self) -> str | None:
        """Why the last try failed."""
        return self._error

    def close(self, within_secs: float = _LAST_SECS) -> None:
        """Send the history once more, give up everything else, and end the thread: in ``within_secs`` at most."""
        with self._wake:
            is_idle = self._is_idle()
            self._is_closing = True
            self._wake.notify_all()
            if not is_idle:
                self._places.copies.pace.stop()
                # It may wait for a network that hangs.
                within_secs = min(within_secs, _GIVING_UP_SECS)
            self._wake.wait_for(lambda: self._is_done, within_secs)
        self._places.copies.pace.stop()

    # --- the uploader's thread ---

    def _run(self) -> None:
        yield_to_others()
        try:
            self._look_until_done()
            while (name := self._next()) is not None:
                self._send_until_done(name)
                with self._wake:
                    self._sending = None
                    self._wake.notify_all()
            if not self._places.copies.pace.is_stopped:
                self._try(lambda: self._send_history(is_last=True))
        except LogdirInUseError as error:
            self._give_up(described(error))
            self._on_lost(error)
        except Exception as error:  # noqa: BLE001 - a thread's edge: the run itself must not fail because of its copy
            self._give_up(described(error))
            _log.exception("mirror %s: nothing more is copied, because of an error", self._url)
            self._observer.warn(f"mirror {self._url}: nothing more is copied: {described(error)}")
        finally:
            with self._wake:
                self._is_done = self._is_over = True
                self._wake.notify_all()

    def _give_up(self, error: str) -> None:
        self._error = error
        self._note()

    def _next(self) -> str | None:
        """Wait for a commit; ``None`` at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting is not None or self._is_closing)
            if self._is_closing:
                return None
            self._sending, self._waiting = self._waiting, None
            return self._sending

    def _send_until_done(self, name: str) -> None:
        """Send a checkpoint, with retries, unless a newer one is committed meanwhile or the run ends."""
        began, tries = time.monotonic(), 0
        while not self._places.copies.pace.is_stopped:
            self._note()
            try:
                self._send(name)
                with self._wake:
                    self._error = self._sending = None
                self._note()
                return
            except StoppedError:
                return
            except FileNotFoundError as error:
                self.skipped += 1
                _log.info("mirror %s: %s was pruned before it could be copied: %s", self._url, name, error)
                return
            except CheckpointError as error:
                self._warn(f"mirror {self._url}: {name} is not copied, because it is damaged here: {error}")
                return
            except OSError as error:
                tries += 1
                if not self._pause(name, error, tries, began):
                    return

    def _pause(self, name: str, error: OSError, tries: int, began: float) -> bool:
        """Wait until the next try; ``False`` if there is none, because a newer checkpoint waits or the run is over."""
        self._error = str(error)
        self._note()
        wait_secs = self._retry(tries, time.monotonic() - began)
        if wait_secs is None:
            return False
        message = f"mirror {self._url}: {name} could not be copied ({error}); next try in {wait_secs:.1f} s"
        # Warn at the 1st, 2nd, 4th, 8th ... try, not at each: a network may be gone for a day.
        if tries & (tries - 1) == 0:
            self._warn(message)
        with self._wake:
            self._is_pausing = True
            is_over = self._wake.wait_for(lambda: self._waiting is not None or self._is_closing, wait_secs)
            self._is_pausing = False
            if is_over and self._waiting is not None:
                self.skipped += 1
        # Credentials may have been renewed meanwhile.
        self._places.copies.remote.reopen()
        return not is_over

    def _warn(self, message: str) -> None:
        _log.warning("%s", message)
        self._observer.warn(message)

    def _send(self, name: str) -> None:
        places = self._places
        checkpoint = next((one for one in places.store.candidates() if one.name == name), None)
        manifest = None if checkpoint is None else places.store.read_manifest(checkpoint)
        if checkpoint is None or manifest is None:
            raise FileNotFoundError(f"{name} has no manifest any more")
        places.lease.check()
        began = time.monotonic()
        before, there = next(reversed(self._mirrored.values()), None), self._mirrored.get(name)
        if there is not None and there.files == manifest.files:
            if before is not there:  # The run went back to it, which its time says there.
                places.copies.send_manifest(manifest, check=places.lease.check)
                self._noted(manifest)
        else:
            sent = places.copies.send(checkpoint.root, manifest, before, check=places.lease.check)
            self._noted(manifest)
            secs = round(time.monotonic() - began, 3)
            _log.info("mirror %s: copied step %s, %d bytes sent, in %.2f s", self._url, manifest.step, sent, secs)
            self._observer.mirrored(name=name, step=manifest.step, nbytes=sent, secs=secs)
        self._send_marks(name)
        self._prune(name)
        places.copies.state(name, [one.name for one in reversed(self._known[:_MOST_TOLD])])
        self._send_history(is_last=False)

    def _send_marks(self, newest: str) -> None:
        """Send the manifests whose marks have changed; that of the newest last, so that it stays the newest there."""
        with self._wake:
            names, self._marked = self._marked, set()
        try:
            was_any = [self._send_mark(name) for name in sorted(names - {newest})]
            self._send_mark(newest, anew=any(was_any))
        except OSError:
            with self._wake:
                self._marked |= names
            raise

    def _send_mark(self, name: str, *, anew: bool = False) -> bool:
        """Send the manifest of ``name`` if it differs from the one there in its marks alone; ``anew``, in any case."""
        there, mine = self._mirrored.get(name), None
        with contextlib.suppress(CheckpointError):
            found = [one for one in self._places.store.candidates() if one.name == name]
            mine = self._places.store.read_manifest(found[0]) if found else None
        if there is None or mine is None or mine.files != there.files or (mine == there and not anew):
            return False
        self._places.copies.send_manifest(mine, check=self._places.lease.check)
        self._mirrored[name] = mine
        return True

    def _noted(self, manifest: Manifest) -> None:
        self._mirrored.pop(manifest.name, None)
        self._mirrored[manifest.name] = manifest
        sizes = {one.name: one.size for one in manifest.files}
        rest = [one for one in self._known if one.name != manifest.name]
        self._known = [Copied(manifest.name, manifest.step, time.time(), sizes), *rest]

    def _prune(self, name: str) -> None:
        """Remove what is too many in the mirror; the one that was just proven there always stays."""
        pinned = self._pinned()
        counted = [one for one in self._known if one.name not in pinned]
        doomed = [one for one in counted[self._options.keep or len(counted) :] if one.name != name]
        if doomed:
            self._places.copies.remove(doomed)
        self._known = [one for one in self._known if one not in doomed]
        for one in doomed:
            self._mirrored.pop(one.name, None)

    def _pinned(self) -> frozenset[str]:
        """What is pinned in the logdir, and in the mirror: a new machine has not fetched all that are there."""
        pins = self._places.store.pins
        there = [Marked(one.name, one.step, one.time, one.marks) for one in self._mirrored.values() if one.marks]
        return pins.pinned | standing(sorted(there, key=lambda one: one.time), pins.rule).pinned

    def _send_history(self, *, is_last: bool) -> None:
        self._places.lease.check()
        self._places.history.send(is_last=is_last)

    def _note(self) -> None:
        rows = [
            MirroredCheckpoint(one.name, one.step, manifest.time, manifest.size, manifest.engine)
            for one in self._known[:_MOST_TOLD]
            if (manifest := self._mirrored.get(one.name)) is not None
        ]
        try:
            records.write(Path(self._places.store.root), self._url, rows, waiting=self.left, error=self._error)
        except OSError as error:
            _log.debug("%s: could not be written: %s", records.FILE_NAME, error)

    # --- the look at what is in the mirror, once at the start ---

    def _look_until_done(self) -> None:
        began, tries = time.monotonic(), 0
        while not self._is_closing:
            try:
                self._look()
                break
            except StoppedError:
                break
            except OSError as error:
                tries += 1
                if not self._pause_look(error, tries, began):
                    break
        with self._wake:
            self._is_looking = False
            self._wake.notify_all()

    def _pause_look(self, error: OSError, tries: int, began: float) -> bool:
        self._error = str(error)
        self._note()
        wait_secs = self._retry(tries, time.monotonic() - began)
        if tries & (tries - 1) == 0:
            self._warn(f"mirror {self._url}: it cannot be looked at ({error}); it is tried again")
        with self._wake:
            self._is_pausing = True
            is_over = self._wake.wait_for(lambda: self._is_closing, wait_secs)
            self._is_pausing = False
        self._places.copies.remote.reopen()
        return not is_over

    def _look(self) -> None:
        """Remove what cut uploads have left, compare the copies with their manifests, and repair them from here."""
        places = self._places
        if not places.lease.is_settled:
            places.lease.acquire()
        places.lease.check()
        places.copies.sweep()
        # By the time of their upload, as the retention counts.
        listed = places.copies.listed(basename=places.store.basename)
        found = sorted(listed, key=lambda one: -one.modified)
        here = {one.name: one for one in places.store.candidates() if one.is_committed}
        sound = []
        for number, copied in enumerate(found):
            reads = self._options.check == "all" or (self._options.check == "newest" and number == 0)
            sound.append(self._sound(copied, here.get(copied.name), reads=reads))
        # Damaged ones count, so that they are removed in their turn.
        self._known = found
        self._mirrored = {one.name: one for one in reversed(sound) if one is not None}
        newest = next(iter(here), None)
        # Otherwise another machine would go on where this run was before it was put back.
        is_put_back = bool(listed) and listed[0].name != newest and self._is_given_up(listed[0].name)
        with self._wake:
            self._newest = self._newest or newest
            is_done = newest in self._mirrored and not self._marked and not is_put_back
            if newest is not None and self._waiting is None and not is_done:
                self._waiting = newest
        self._note()

    def _is_given_up(self, name: str) -> bool:
        last, manifest = rollback.read(self._places.store.root), self._mirrored.get(name)
        return last is not None and manifest is not None and last.gives_up(manifest.step, manifest.time)

    def _sound(self, copied: Copied, here: Checkpoint | None, *, reads: bool) -> Manifest | None:
        """The manifest of a copy that is good, perhaps after a repair; ``None`` if it is not."""
        copies, store = self._places.copies, self._places.store
        mine = None
        try:
            mine = None if here is None else store.read_manifest(here)
        except CheckpointError as error:
            self._warn(
                f"mirror {self._url}: {copied.name} is not compared with the one here, which is damaged: {error}"
            )
        try:
            manifest = copies.manifest(copied.name)
        except FileNotFoundError:
            return None
        except CheckpointError as error:
            self._warn(f"mirror {self._url}: {error}; it is sent again if it is good here")
            return None
        if mine is not None and mine.files != manifest.files:
            return None  # Another save of the same step: the one here is sent when it is the newest.
        if mine is not None and mine.marks != manifest.marks:
            self._marked.add(copied.name)
        damages = copies.damages(copied, manifest, reads=reads)
        for record, reason in damages:
            told = f"mirror {self._url}: {record.name} is damaged there ({reason})"
            if mine is None or here is None:
                self._warn(f"{told}, and there is no copy of it here")
                return None
            try:
                copies.send_file(here.root / record.name, record)
            except (CheckpointCorruptError, FileNotFoundError) as error:
                self._warn(f"{told}, and it cannot be repaired from here: {error}")
                return None
            self._warn(f"{told}: repaired from {here.root / record.name}")
        return manifest

    def _try(self, function: Callable[[], object]) -> None:
        try:
            function()
        except OSError as error:
            _log.info("mirror %s: the history could not be copied: %s", self._url, error)
