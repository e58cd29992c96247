"""Finds and restores the checkpoint from which a run continues, or reports exactly why it cannot.

TensorFlow programs write checkpoints to more places than a run's own store knows: under other names, in the format
before V2, in other directories. `SEARCHES` lists all the places in their order. The policy in each place is that of
`stepguard.saving.restoring`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from stepguard.errors import CheckpointCorruptError, CheckpointMismatchError, NoGoodCheckpointError
from stepguard.options import Restoring
from stepguard.saving import restoring
from stepguard.store import Checkpoint, CheckpointStore, Recovery, statefile, tensorflow_files
from stepguard.store.checkpoint import split_name
from stepguard.store.layout import Layout
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX
from stepguard.tensorflow.checkpoint import tensors
from stepguard.tensorflow.checkpoint.mismatch import check_fits
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

ENGINE = "tensorflow"


class Restorer:
    """Restores the newest good checkpoint of a directory.

    ``store`` is the supervisor's own store: damaged checkpoints are moved out of it. Without a store nothing is moved.
    """

    def __init__(self, store: CheckpointStore | None = None, options: Restoring | None = None) -> None:
        self._store = store
        self._options = Restoring() if options is None else options

    def restore_newest(self, session: Any, saver: Any, directory: str) -> Recovery | None:
        """Restore the newest good checkpoint; ``None`` if there are no checkpoints.

        Raises:
            NoGoodCheckpointError: checkpoints exist, but all are damaged.
            CheckpointMismatchError: a good checkpoint does not fit the graph. Nothing was overwritten or moved.
        """
        start = _Start(session, saver, directory, self._store, self._options)
        # What was asked for by its step or name is one of the run's own.
        for search in SEARCHES if self._options.step is None else (_own,):
            recovered = search(start)
            if recovered is not None:
                return recovered
        return None

    def go_on(self, saver: Any) -> None:
        """Continue a model that is alive on its servers, without restoring it.

        The retention rules then also apply to the checkpoints of earlier runs.
        """
        if self._store is None:
            return
        if not self._store.candidates():
            _log.warning(
                "the model lives on its servers, and %s holds no checkpoint: training goes on with what lives there. "
                "For a run from the beginning, start the servers anew",
                self._store.root,
            )
        self._store.adopt_earlier()
        _tell_owned(self._store, saver)


def restore_file(session: Any, saver: Any, path: str) -> None:
    """Restore the checkpoint with the prefix ``path``.

    Raises:
        CheckpointMismatchError: the checkpoint does not fit the graph. Nothing was overwritten.
        CheckpointCorruptError: a file of it is a FIFO, a device or another thing that cannot be read to an end.
        ValueError: there is no such checkpoint.
    """
    path = tensorflow_files.without_pattern(path)
    # Only a saver that the program itself defines knows which files it needs.
    is_standard = isinstance(saver, _v1.train.Saver) and type(saver).restore is _v1.train.Saver.restore
    if is_standard and not tensors.exists(path):
        entry = tensorflow_files.entry_file(os.path.basename(path))
        raise ValueError(
            f"{path}: expected a checkpoint with this prefix, found no {entry}; "
            "tf.train.latest_checkpoint(directory) returns the prefix of the newest one of a directory"
        )
    if is_standard:
        tensors.check_readable(path)
    path = tensors.restorable(path)
    graph = session.graph
    with graph.as_default():
        check_fits(saver, graph, path)
        # A SavedModel needs these run before its variables are restored.
        initializers = _v1.get_collection("saved_model_initializers")
        if initializers:
            session.run(initializers)
        # A master in another process may not be able to reach this machine's directory for temporary files.
        is_here = not getattr(session, "sess_str", "")
        with tensors.without_pattern(path) if is_here else nullcontext(path) as place:
            saver.restore(session, place)


# --- the searches ---


@dataclass(frozen=True, slots=True)
class _Start:
    """The session to restore into, and the places to search: the supervisor's own store, and a directory."""

    session: Any
    saver: Any
    directory: str
    store: CheckpointStore | None
    options: Restoring

    @property
    def is_remote(self) -> bool:
        """Whether only TensorFlow can reach the directory."""
        return "://" in self.directory

    @property
    def has_known_saver(self) -> bool:
        """Whether the saver is a standard Saver, whose files are known; another saver may use other files."""
        return isinstance(self.saver, _v1.train.Saver)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint of a store."""
        if checkpoint.manifest is None:
            self.restore_unproven(str(checkpoint.path))
        else:
            restore_file(self.session, self.saver, str(checkpoint.path))

    def restore_unproven(self, path: str) -> None:
        """Restore a checkpoint without a manifest. Raises CheckpointCorruptError if its bytes are damaged."""
        try:
            restore_file(self.session, self.saver, path)
        except CheckpointMismatchError:
            raise  # The checkpoint is readable but belongs to another model. (The error may be a NotFoundError too.)
        except Exception as error:
            damage = tensors.damage(path)
            if damage is None:
                raise
            raise CheckpointCorruptError(f"{path}: {tensors.cause(damage)}", path=Path(path)) from error

    def step_held(self, path: str | Path) -> int | None:
        """The global step in the checkpoint at ``path``."""
        counters = self.session.graph.get_collection(_v1.GraphKeys.GLOBAL_STEP)
        return tensors.step_held(path, counters[0].op.name if counters else "global_step")

    def found_at(self, path: str) -> Checkpoint:
        """The checkpoint at ``path``, which the state file names and no store knows."""
        place, step = Path(path), self.step_held(path)
        step = split_name(place.name)[1] if step is None else step
        return Checkpoint(place.parent, place.name, step, tensors.written_at(path), False)

    def store_of(self, basename: str) -> CheckpointStore:
        """A store of the checkpoints with this basename in the directory."""
        return CheckpointStore(self.directory, basename=basename, engine=ENGINE, saver_files=tensorflow_files)


def _named_unknown(start: _Start) -> Recovery | None:
    """Restore the checkpoint that the state file names, if it is newer than all others and no store knows it.

    That is one in the format before V2, which has no entry file, unless it has a manifest; and one whose name begins
    with a dot, as the names of a store's own files do.
    """
    state = None if start.is_remote else statefile.read(Path(start.directory))
    if state is None or not start.has_known_saver:
        return None
    places = (Path(start.directory, state.newest), Path(start.directory, state.path))
    place = next((one for one in places if _is_hidden(one) or tensors.is_old_format(str(one))), None)
    if place is None or place.with_name(place.name + MANIFEST_SUFFIX).exists() or not tensors.exists(str(place)):
        return None
    named = start.found_at(str(place))
    store = start.store
    if store is None and not _is_hidden(place):
        store = start.store_of(split_name(place.name)[0])
    others = [] if store is None else store.candidates(start.step_held)
    if others and (named.step is None or named.step <= (others[0].step or 0)):
        return None
    try:
        if not _is_hidden(place):
            _check_whole(named)
        start.restore_unproven(str(place))
    except CheckpointCorruptError as error:
        _refuse_unknown(start, named, error, has_others=bool(others))
        return None
    return _restored(start, Recovery(named), None)


def _is_hidden(place: Path) -> bool:
    return place.name.startswith(".")


def _check_whole(old: Checkpoint) -> None:
    layout = Layout(old.root, split_name(old.name)[0], tensorflow_files)
    if (missing := layout.missing_data(old.name, layout.present(old.name))) is not None:
        raise CheckpointCorruptError(f"{old.path.with_name(missing)}: expected a file, found none", path=old.path)


def _refuse_unknown(start: _Start, named: Checkpoint, damage: CheckpointCorruptError, *, has_others: bool) -> None:
    """Raise NoGoodCheckpointError, unless there are other checkpoints to try or the options allow to start over."""
    message = (
        f"{named.path}: expected the checkpoint that the file {statefile.FILE_NAME!r} in {start.directory} names as "
        f"the newest, found it damaged ({damage})"
    )
    if has_others:
        _log.warning("%s", message)
        return
    refused = NoGoodCheckpointError(
        f"{message}. Nothing was changed. Put a good copy back; or, to start over from step 0, use another logdir, or "
        f"move it and the file {statefile.FILE_NAME!r} away",
        path=named.path,
    )
    if start.store is None or not start.options.start_over_when_all_damaged:
        raise refused from damage
    restoring.start_over(start.store, refused)


def _named_newer(start: _Start) -> Recovery | None:
    """Restore the program's own last save under another name, if it is newer than the supervisor's checkpoints."""
    own = start.store
    state = None if own is None else statefile.read(own.root)
    if own is None or state is None or split_name(state.newest)[0] == own.basename or _is_hidden(state.path):
        return None
    store = CheckpointStore(own.root, basename=split_name(state.newest)[0], engine=ENGINE, saver_files=tensorflow_files)
    named = next((one for one in store.candidates(start.step_held) if one.name == state.newest), None)
    newest = next(iter(own.candidates(start.step_held)), None)
    step = split_name(state.newest)[1] if named is None else named.step
    if newest is None or newest.step is None or step is None or step <= newest.step:
        return None
    reason: object = f"there is no file of it in {own.root}"
    if named is not None:
        try:
            return _restored(start, Recovery(restoring.restore_one(store, start.restore, named)), store)
        except (CheckpointCorruptError, CheckpointMismatchError) as error:
            reason = error  # It may belong to another model; the supervisor has a checkpoint of its own to try.
    _log.warning("the newest by the state file, %s, is not gone on with: %s", state.newest, reason)
    return None


def _own(start: _Start) -> Recovery | None:
    """Restore the newest good checkpoint of the supervisor's own store."""
    own = start.store
    if own is None or _holds_only_a_strangers(own, start.session):
        return None
    found = restoring.restore_newest(
        own,
        start.restore,
        start.options,
        step_held=start.step_held,
        # A saver that the program defines is called later, with the path in the state file.
        refuses_missing=start.has_known_saver,
    )
    if found.checkpoint is None:
        return None
    _tell_owned(own, start.saver)
    return found


def _other_names(start: _Start) -> Recovery | None:
    """Restore the newest good checkpoint of any name in the directory, if the supervisor's store is not there."""
    own = start.store
    if start.is_remote or (own is not None and own.root.absolute() == Path(start.directory).absolute()):
        return None
    for basename in _basenames(start.directory):
        store = start.store_of(basename)
        found = restoring.find_newest(
            store, start.restore, step_held=start.step_held, refuses_missing=start.has_known_saver
        )
        if found.checkpoint is not None:
            return _restored(start, found, store)
    return None


def _named_anywhere(start: _Start) -> Recovery | None:
    """Restore the checkpoint that the state file names, wherever it is.

    The directory of the state file is searched too, because it may have been moved.
    """
    state = _state_of(start.directory)
    if state is None:
        return None
    for path in dict.fromkeys([state.model_checkpoint_path, *reversed(state.all_model_checkpoint_paths)]):
        for place in (path, os.path.join(start.directory, os.path.basename(path))):
            # Only a saver that the program itself defines knows which files it needs.
            is_for_saver = place == path and not start.has_known_saver
            if is_for_saver or tf.io.gfile.exists(tensorflow_files.entry_file(place)) or tf.io.gfile.exists(place):
                restore_file(start.session, start.saver, place)
                return _restored(start, Recovery(start.found_at(place)), None)
    return None


SEARCHES: tuple[Callable[[_Start], Recovery | None], ...] = (
    _named_unknown,
    _named_newer,
    _own,
    _other_names,
    _named_anywhere,
)
"""Each search restores what it finds and returns that; None means that the next search is tried."""


def _restored(start: _Start, found: Recovery, store: CheckpointStore | None) -> Recovery:
    """Report what was restored, and apply the retention rules to the earlier run's checkpoints too.

    ``store`` is the store in which it was found; ``None`` if it was found only by the state file.
    """
    restoring.report(found)
    if store is not None:
        keeper = start.store if start.store is not None and start.store.candidates() else store
        keeper.adopt_earlier()
        _tell_owned(keeper, start.saver)
    elif (state := _state_of(start.directory)) is not None:
        _tell_saver(start.saver, [(one, 0.0) for one in state.all_model_checkpoint_paths])
    return found


def _holds_only_a_strangers(store: CheckpointStore, session: Any) -> bool:
    """Whether the store holds only one checkpoint, without a step, that no run of this program has saved."""
    found = store.candidates()
    if len(found) != 1 or not _counts_steps(session.graph):
        return False
    one, listed = found[0], [listed.name for listed in store.listed_by_state()]
    if one.step is not None or one.is_committed or one.name in listed:
        return False
    _log.warning(
        "%s is not restored: it has no step, and no state file names it. To begin with what it holds, restore it "
        "in init_fn; to go on with it, name it in a state file (tf.train.update_checkpoint_state)",
        one.path,
    )
    return True


def _basenames(directory: str) -> list[str]:
    """The basenames of the checkpoints in a directory: first that of the state file, then the usual one."""
    found: dict[str, None] = {}
    state = _state_of(directory)
    if state is not None:
        found[split_name(os.path.basename(state.model_checkpoint_path))[0]] = None
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    entries = [entry for name in names if (entry := tensorflow_files.checkpoint_of_entry(name)) is not None]
    # A checkpoint without a step may be any model that somebody has put there.
    numbered = {basename for basename, step in map(split_name, entries) if step is not None}
    usual = {name for name in entries if name == "model.ckpt"}
    found.update(dict.fromkeys(sorted(numbered | usual, key=lambda name: (name != "model.ckpt", name))))
    return [name for name in found if name and not name.startswith(".")]


def _counts_steps(graph: Any) -> bool:
    if graph.get_collection(_v1.GraphKeys.GLOBAL_STEP):
        return True
    try:
        graph.get_operation_by_name("global_step")
    except KeyError:
        return False
    return True


def _state_of(directory: str) -> Any:
    """TensorFlow's own reading of the state file; ``None`` if there is none that can be used."""
    if "://" not in directory and statefile.read(Path(directory)) is None:
        return None  # TensorFlow would wait at a FIFO for ever.
    try:
        return _v1.train.get_checkpoint_state(directory)
    except ValueError:
        return None  # The file is unusable, for example empty.


def _tell_owned(store: CheckpointStore, saver: Any) -> None:
    """Put the checkpoints of the store on the saver's own list."""
    _tell_saver(saver, [(tensors.restorable(str(one.path)), one.time) for one in store.owned])


def _tell_saver(saver: Any, kept: list[tuple[str, float]]) -> None:
    """Set the saver's own list, oldest first, from which it prunes if the program calls its save() itself."""
    if hasattr(saver, "set_last_checkpoints_with_time"):
        saver.set_last_checkpoints_with_time(kept)
    elif hasattr(saver, "recover_last_checkpoints"):
        saver.recover_last_checkpoints([path for path, _ in kept])
