"""Finding the checkpoint to go on from, and restoring it, or saying exactly why that cannot be."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import tensorflow as tf

from stepguard import files
from stepguard.errors import CheckpointCorruptError, CheckpointMismatchError, NoGoodCheckpointError
from stepguard.store import Checkpoint, CheckpointStore, Recovery, statefile
from stepguard.store.layout import Layout
from stepguard.store.manifest import SUFFIX as MANIFEST_SUFFIX
from stepguard.store.recovery import QUARANTINE
from stepguard.tensorflow.checkpoint import tensors
from stepguard.tensorflow.checkpoint.mismatch import check_fits

_log = logging.getLogger(__name__)
_v1 = tf.compat.v1

ENGINE = "tensorflow"
ENTRY_SUFFIX = ".index"


class Restorer:
    """Restores the newest good checkpoint of a directory.

    ``store`` is the supervisor's own: damaged checkpoints are moved out of its way, if ``hold()``, a context, says
    that no other process is the chief of the logdir meanwhile. Otherwise nothing is moved: a reader never touches what
    a chief may be writing.
    """

    def __init__(
        self,
        store: CheckpointStore | None = None,
        *,
        hold: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(False),
        start_over_when_all_damaged: bool = False,
    ) -> None:
        self._store = store
        self._hold = hold
        self._start_over_when_all_damaged = start_over_when_all_damaged

    def restore_newest(self, session: Any, saver: Any, directory: str) -> bool:
        """Restore the newest good checkpoint; ``False`` when there is none at all.

        Raises:
            NoGoodCheckpointError: checkpoints exist, and every one is damaged.
            CheckpointMismatchError: a good checkpoint does not fit the graph. Nothing was overwritten or moved.
        """
        if "://" not in directory and self._restore_old_format(session, saver, Path(directory)):
            return True
        if self._store is not None:
            if self._restore_named_newer(self._store, session, saver):
                return True
            if self._restore_from(self._store, session, saver, is_ours=True):
                return True
            if "://" not in directory and self._store.root.absolute() == Path(directory).absolute():
                return self._restore_named_by_state_file(session, saver, directory)
        if "://" not in directory:
            for basename in _basenames(directory):
                store = CheckpointStore(directory, basename=basename, engine=ENGINE, entry_suffix=ENTRY_SUFFIX)
                if self._restore_from(store, session, saver, is_ours=False):
                    return True
        return self._restore_named_by_state_file(session, saver, directory)

    def restore_file(self, session: Any, saver: Any, path: str) -> None:
        """Restore the checkpoint with the prefix ``path``.

        Raises:
            CheckpointMismatchError: it does not fit the graph. Nothing was overwritten.
            ValueError: there is no such checkpoint.
        """
        path = statefile.without_shards(path)
        # A saver of the program's own knows itself which files it needs.
        is_standard = isinstance(saver, _v1.train.Saver) and type(saver).restore is _v1.train.Saver.restore
        if is_standard and not tensors.exists(path):
            raise ValueError(
                f"{path}: expected a checkpoint with this prefix, found no {os.path.basename(path)}{ENTRY_SUFFIX}; "
                "tf.train.latest_checkpoint(directory) returns the prefix of the newest one of a directory"
            )
        path = tensors.restorable(path)
        graph = session.graph
        with graph.as_default():
            check_fits(saver, graph, path)
            # What a SavedModel needs in place before its variables are restored.
            initializers = _v1.get_collection("saved_model_initializers")
            if initializers:
                session.run(initializers)
            # A master that is another process may not reach this machine's directory for temporary files.
            is_here = not getattr(session, "sess_str", "")
            with tensors.without_pattern(path) if is_here else nullcontext(path) as place:
                saver.restore(session, place)

    def _restore_from(self, store: CheckpointStore, session: Any, saver: Any, *, is_ours: bool) -> bool:
        if is_ours and self._holds_only_a_strangers(store, session):
            return False

        def attempt(checkpoint: Checkpoint) -> None:
            path = str(checkpoint.path)
            written_by = ENGINE if checkpoint.manifest is None else checkpoint.manifest.engine
            if written_by != ENGINE:
                raise CheckpointMismatchError(
                    f"{path}: expected a checkpoint of the engine {ENGINE!r}, found one of {written_by!r}; give this "
                    f"run another logdir",
                    path=checkpoint.path,
                )
            try:
                self.restore_file(session, saver, path)
            except CheckpointMismatchError:
                # It could be read, and is for another model: also a NotFoundError, for one.
                raise
            except Exception as error:
                if checkpoint.manifest is not None:
                    # Proven good: unless it was pruned since, this is an error of the program.
                    store.verify(checkpoint)
                    raise
                damage = tensors.damage(path)
                if damage is None:
                    raise
                raise CheckpointCorruptError(f"{path}: {tensors.cause(damage)}", path=checkpoint.path) from error

        try:
            recovery = store.newest_good(attempt=attempt, quarantine=False)
            # A saver of the program's own knows itself which files it needs: it is asked with the state file's path.
            if recovery.checkpoint is None and recovery.damaged and isinstance(saver, _v1.train.Saver):
                raise NoGoodCheckpointError(
                    f"{store.root}: {recovery.message()} To start over from step 0, use another logdir, or move the "
                    f"file {statefile.FILE_NAME!r} away",
                    path=store.root,
                )
        except NoGoodCheckpointError as error:
            if not (is_ours and self._start_over_when_all_damaged):
                raise
            self._start_over(store, error)
            return False
        good = recovery.checkpoint
        if good is None:
            return False
        if recovery.damaged:
            recovery = self._quarantine(store, recovery) if is_ours else recovery
            _log.warning("%s", recovery.message())
        _log.info("restored %s", good.path)
        if self._store is not None:
            # Also when it was found beside the supervisor's own: it is what was lost that counts.
            self._store.last_recovery = recovery
            store = self._store if self._store.candidates() else store
        _own_earlier(store, saver)
        return True

    def go_on(self, saver: Any) -> None:
        """The model lives, and nothing is restored: what an earlier run has saved of it is pruned as ever."""
        if self._store is None:
            return
        if not self._store.candidates():
            _log.warning(
                "the model lives on its servers, and %s holds no checkpoint: training goes on with what lives there. "
                "For a run from the beginning, start the servers anew",
                self._store.root,
            )
        _own_earlier(self._store, saver)

    def _restore_named_newer(self, own: CheckpointStore, session: Any, saver: Any) -> bool:
        """Restore what the program has saved last under another name, if that is newer than what the supervisor has."""
        state = statefile.read(own.root)
        if state is None:
            return False
        basename, step = _without_step(state.newest), _step_of(state.newest)
        newest = max((one.step for one in own.candidates() if one.step is not None), default=None)
        if basename == own.basename or step is None or newest is None or step <= newest:
            return False
        store = CheckpointStore(own.root, basename=basename, engine=ENGINE, entry_suffix=ENTRY_SUFFIX)
        try:
            return self._restore_from(store, session, saver, is_ours=False)
        except (NoGoodCheckpointError, CheckpointMismatchError) as error:
            # It may be another model's, and there is one of the supervisor's own.
            _log.warning("the newest by the state file, %s, is not gone on with: %s", state.newest, error)
            return False

    def _restore_old_format(self, session: Any, saver: Any, directory: Path) -> bool:
        """Restore what the state file names, if that is newer than all else, and of the Saver's format before V2: it
        has no entry file, and no store knows it without a manifest.
        """
        state = statefile.read(directory)
        # A saver of the program's own knows itself which files it needs.
        if state is None or not isinstance(saver, _v1.train.Saver):
            return False
        places = (directory / state.newest, directory / state.path)
        place = next((one for one in places if tensors.is_old_format(str(one))), None)
        if place is None or place.with_name(place.name + MANIFEST_SUFFIX).exists():
            return False
        basename, step = _without_step(state.newest), _step_of(state.newest)
        store = self._store or CheckpointStore(directory, basename=basename, entry_suffix=ENTRY_SUFFIX)
        others = store.candidates()
        if others and (step is None or step <= max(one.step or 0 for one in others)):
            return False
        try:
            layout = Layout(place.parent, basename, ENTRY_SUFFIX)
            if (missing := layout.missing_data(place.name, layout.present(place.name))) is not None:
                raise CheckpointCorruptError(f"{place.with_name(missing)}: expected a file, found none", path=place)
            self.restore_file(session, saver, str(place))
        except CheckpointMismatchError:
            raise
        except Exception as error:
            damage = error if isinstance(error, CheckpointCorruptError) else tensors.damage(str(place))
            if damage is None:
                raise
            message = (
                f"{place}: expected the checkpoint that the file {statefile.FILE_NAME!r} in {directory} names as the "
                f"newest, found it damaged ({tensors.cause(damage)})"
            )
            if others:
                _log.warning("%s", message)
                return False
            refused = NoGoodCheckpointError(
                f"{message}. Nothing was changed. Put a good copy back; or, to start over from step 0, use another "
                f"logdir, or move it and the file {statefile.FILE_NAME!r} away",
                path=place,
            )
            if self._store is None or not self._start_over_when_all_damaged:
                raise refused from error
            self._start_over(self._store, refused)
            return False
        _log.info("restored %s", place)
        _tell_saver(saver, [(one, 0.0) for one in _state_of(str(directory)).all_model_checkpoint_paths])
        return True

    def _holds_only_a_strangers(self, store: CheckpointStore, session: Any) -> bool:
        """Whether all that is there is a model without a step that no run of this program has saved."""
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

    def _quarantine(self, store: CheckpointStore, recovery: Recovery) -> Recovery:
        with self._hold() as may_move:
            if not may_move:
                return recovery
            present = {(one.root, one.name) for one in store.candidates()}
            damaged = [
                # What is only named by the state file is not there to be moved.
                store.quarantine(one.checkpoint, one.reason)
                if (one.checkpoint.root, one.checkpoint.name) in present
                else one
                for one in recovery.damaged
            ]
            if recovery.checkpoint is not None:
                store.point_to(recovery.checkpoint)
        return Recovery(recovery.checkpoint, tuple(damaged))

    def _start_over(self, store: CheckpointStore, error: NoGoodCheckpointError) -> None:
        with self._hold() as may_move:
            if not may_move:
                raise error
            for candidate in store.candidates():
                store.quarantine(candidate, "none of the checkpoints was good, and starting over was asked for")
            with contextlib.suppress(FileNotFoundError):
                # In a copied logdir it may still name good ones elsewhere, which are not this run's.
                files.make_dirs(store.root / QUARANTINE)
                files.move(store.root / statefile.FILE_NAME, store.root / QUARANTINE / statefile.FILE_NAME)
        _log.warning(
            "none of the checkpoints in %s is good: they are in %s now, and training starts over, as asked for",
            store.root,
            store.root / QUARANTINE,
        )

    def _restore_named_by_state_file(self, session: Any, saver: Any, directory: str) -> bool:
        """Restore what the state file names, which may lie anywhere; a directory that was moved is looked at too."""
        state = _state_of(directory)
        if state is None:
            return False
        for path in dict.fromkeys([state.model_checkpoint_path, *reversed(state.all_model_checkpoint_paths)]):
            for place in (path, os.path.join(directory, os.path.basename(path))):
                # A saver of the program's own knows itself which files it needs.
                is_own = place == path and not isinstance(saver, _v1.train.Saver)
                if is_own or tf.io.gfile.exists(place + ENTRY_SUFFIX) or tf.io.gfile.exists(place):
                    self.restore_file(session, saver, place)
                    _log.info("restored %s", place)
                    _tell_saver(saver, [(one, 0.0) for one in state.all_model_checkpoint_paths])
                    return True
        return False


def _basenames(directory: str) -> list[str]:
    """The basenames of the checkpoints in a directory; that of the state file first, then the usual one."""
    found: dict[str, None] = {}
    state = _state_of(directory)
    if state is not None:
        found[_without_step(os.path.basename(state.model_checkpoint_path))] = None
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    entries = [name[: -len(ENTRY_SUFFIX)] for name in names if name.endswith(ENTRY_SUFFIX)]
    # Without a step it may be any model that somebody has put there.
    numbered = {_without_step(name) for name in entries if _without_step(name) != name}
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
    try:
        return _v1.train.get_checkpoint_state(directory)
    except ValueError:
        return None  # It is empty, say, and tells nothing.


def _without_step(name: str) -> str:
    basename, dash, step = name.rpartition("-")
    return basename if dash and step.isdigit() else name


def _step_of(name: str) -> int | None:
    _, dash, step = name.rpartition("-")
    return int(step) if dash and step.isdigit() else None


def _own_earlier(store: CheckpointStore, saver: Any) -> None:
    """Let retention go on where the run before has stopped: that of the store, and the saver's own."""
    _tell_saver(saver, [(tensors.restorable(str(one.path)), one.time) for one in store.adopt_earlier()])


def _tell_saver(saver: Any, kept: list[tuple[str, float]]) -> None:
    """Let the saver know what it has to prune, also when the program calls its save() itself; oldest first."""
    if hasattr(saver, "set_last_checkpoints_with_time"):
        saver.set_last_checkpoints_with_time(kept)
    elif hasattr(saver, "recover_last_checkpoints"):
        saver.recover_last_checkpoints([path for path, _ in kept])
