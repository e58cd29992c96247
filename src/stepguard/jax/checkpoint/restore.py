"""Restores the state of a checkpoint in the form of the program's own state, or reports exactly why it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepguard.errors import CheckpointMismatchError, NoGoodCheckpointError
from stepguard.jax.checkpoint.files import ENGINE
from stepguard.jax.checkpoint.fitting import Fitting, fit
from stepguard.jax.checkpoint.tree import Leaf, flatten, rebuild
from stepguard.options import Restoring
from stepguard.orbax_files.index import StoredLeaf
from stepguard.orbax_files.reading import Stored, is_checkpoint, open_stored, whole
from stepguard.orbax_files.runs import newest_of_orbax
from stepguard.store import CheckpointStore
from stepguard.words import listed, logger

_log = logger(__name__)

# The parts that hold weights, by the names that programs give them.
_WEIGHTS = ("params", "model", "batch_stats")


def read_state(directory: Path, state: Any, options: Restoring) -> Any:
    """The state of the checkpoint in ``directory``, in the form of ``state``.

    A value comes back as the interrupted run had it: a Python number that a step has made an array is that array. Its
    sharding is that of the program's array in the same place, and each process reads only what its devices need.

    Raises:
        CheckpointMismatchError: the checkpoint does not fit. Nothing was changed.
        CheckpointCorruptError: the checkpoint cannot be read.
    """
    stored = open_stored(directory)
    flat = flatten(state)
    fitting = fit(directory, flat, stored, options)
    made = _rebuilt(state, flat.leaves, stored, fitting)
    if jax.process_index() == 0:
        fitting.report(directory)
    return made


def first_values(state: Any, options: Restoring) -> Any:
    """The state with which a run begins that has no checkpoint: with the weights in ``options.init_from``, if any.

    Raises:
        FileNotFoundError: there is no checkpoint at that path.
        CheckpointMismatchError: the weights do not fit; with ``init_fit="part"``, none of them fits.
    """
    if options.init_from is None:
        return state
    flat = flatten(state)
    parts = {str(leaf.keys[0]): None for leaf in flat.leaves if leaf.keys}
    if isinstance(options.init_from, dict):
        places = {name: Path(place) for name, place in options.init_from.items()}
    else:
        places = {name: Path(options.init_from) for name in parts if name in _WEIGHTS}
    if not places or not places.keys() <= parts.keys():
        raise CheckpointMismatchError(
            f"init_from={options.init_from!r}: expected weights of parts of the state, which are {listed(parts)}; give "
            f"{{name of the part: path}}",
            missing=[*parts],
            unexpected=[name for name in places if name not in parts],
        )
    for name, place in places.items():
        stored = _Part(open_stored(_newest(place)), name)
        own = [leaf for leaf in flat.leaves if leaf.keys and str(leaf.keys[0]) == name]
        ...
    return state
