"""The state of one process, as a file of a checkpoint has it: checked as a whole before any of it is used.

The digest in the manifest says that nobody has changed the file, and nothing of who wrote it. What only a loader can
judge, because the position is one in its own generators and data sets, is taken inside :func:`taking`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from stepguard.disk import schema
from stepguard.disk.schema import Count, Each, Fields
from stepguard.errors import CheckpointCorruptError, StepguardError, described
from stepguard.steps.random_streams import RandomStreams
from stepguard.store.checkpoint import split_name

CHIEF = "process-0"
"""The name, without suffix, of the file of the chief, which has the step of the checkpoint."""

# A row of equal places is written as one with this number.
_MOST_PLACES = 10_000_000

_LIST = (list, tuple)
_TEXTS = Each((str,))
# See `Places` and `Feed.position`; some of these fields are those of one kind of loader.
_NEEDED: dict[str, schema.Form] = {"epoch": Count(), "batches": Count(), "loader": Each((object,), (str,))}
_MORE: dict[str, schema.Form] = {
    "used": (list, tuple, NoneType),
    "remade": (bool,),
    "anew": (bool,),
    "times": Count(1, _MOST_PLACES),
    "processes": Count(1),
    "samples": Count(),
    "last": (str, NoneType),
    "made": Each((str,), (str,)),
    "set before": _TEXTS,
    "order": (dict, NoneType),
    "streams": (dict, NoneType),
    "contents": Each((object,), (str,)),
    "items": _LIST,
    "generators": (list, tuple, NoneType),
    "probes": (int,),
    "counted": (bool,),
    "new generators": Count(),
    "worker_seed": (int,),
    "ahead": Fields({}, {"drawn": Count(), "generators": _LIST}),
    "workers": Fields({"counts": Each((object,), (str,)), "contents": Each((object,), (str,))}),
}
_STATES = (dict, NoneType)
# See `Progress.saved`.
_PLACE = Fields(
    {
        "ended": Count(),
        "inside": (str,),
        "inside body": (str,),
        "origin": _STATES,
        "after": _STATES,
        "gaps": Each(Each((object,), length=2)),
    },
    {
        "draws between": (bool, NoneType),
        "own": Fields(
            {},
            {
                "taken from": (list, tuple, NoneType),
                "held": (dict,),
                "draws before": (bool, NoneType),
                "draws first": (bool,),
                "is at step": (bool,),
                "is cut": (bool,),
                "gap": _STATES,
            },
        ),
    },
)
_POSITION = Fields(_NEEDED, {**_MORE, "members": Each(Fields(_NEEDED, _MORE))})
# See `ProcessState.capture`.
_STATE = Fields(
    {"global_step": Count(), "random": (dict,), "loaders": Each(_POSITION)},
    {
        "drawn": _TEXTS,
        "work before": Fields(
            {"objects": _TEXTS, "rates": Each(Each((float,), length=2), (str,))}, {"begun": Each((float,), (str,))}
        ),
        "is_first": (bool, NoneType),
        "epochs": Fields({"done": Count(), "loops": Count(), "begun": (bool,)}),
        "place": (dict, NoneType),
    },
)


def checked_state(
    found: object, path: Path, streams: RandomStreams, more: Mapping[str, schema.Form] | None = None
) -> dict[str, Any]:
    """Return the content ``found`` of the file ``path``: what `ProcessState.capture` has returned, and the step.

    ``more`` has the forms of what a framework adds.

    Raises CheckpointCorruptError if it is of another form, or of another step than the checkpoint is called after.
    """
    try:
        schema.check(found, _STATE)
        schema.check(found, Fields({}, more or {}))
        state: dict[str, Any] = dict(found)  # type: ignore[call-overload]
        if state.get("place") is not None:
            schema.check(state["place"], _PLACE, "place")
            for number, states in state["place"]["gaps"]:
                schema.check(number, Count(), "place.gaps")
                schema.check(states, (dict,), "place.gaps")
        for place in state["loaders"]:
            if place.get("used") is not None:
                schema.check(place["used"], Each(Count(), length=2), "loaders.used")
        for states in _random_states(state):
            _check_random(states, streams)
        expected = split_name(path.parent.name)[1]
        if path.stem == CHIEF and expected not in (None, state["global_step"]):
            raise schema.SchemaError(f"global_step: expected {expected}, found {state['global_step']}")
    except ValueError as error:
        raise CheckpointCorruptError(
            f"{path}: expected the state of a process, found it wrong: {error}", path=path
        ) from error
    return state


def _random_states(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The random states of the process, those of its loops, and those in the positions."""
    yield state["random"]
    place = state.get("place") or {}
    gaps = (states for _, states in place.get("gaps", ()))
    own = place.get("own") or {}
    yield from (one for one in (place.get("origin"), place.get("after"), own.get("gap"), *gaps) if one is not None)
    for position in state["loaders"]:
        for one in (position, *position.get("members", ())):
            order = one.get("order")
            # Beside the streams of the process, an order may need the generators of the loader.
            found = order["random"] if isinstance(order, Mapping) and "random" in order else order
            yield from (states for states in (found, one.get("streams")) if states is not None)


def _check_random(states: Mapping[str, Any], streams: RandomStreams) -> None:
    try:
        streams.check(states)
    except (*schema.WRONG, RuntimeError) as error:
        raise schema.SchemaError(f"random states: {described(error)}") from error


@contextlib.contextmanager
def taking(what: str) -> Iterator[None]:
    """A block that takes ``what`` from a position in the data. Raises CheckpointCorruptError if it is no such thing."""
    try:
        yield
    except StepguardError:
        raise
    except (*schema.WRONG, RuntimeError) as error:
        raise CheckpointCorruptError(
            f"{what}: expected what the run before has saved of it, found something else ({described(error)}). Pass "
            f"resume_data=False to steps() to begin a new epoch, or go back to another checkpoint"
        ) from error
