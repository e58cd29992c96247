"""Whether two runs are the same: their traces moment by moment, and the state of their last step, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepguard.cli.logdir import tensor_readers
from stepguard.cli.logdir.checkpoint_changes import Change, compared
from stepguard.cli.logdir.contents import GOOD, ListedCheckpoint, list_contents
from stepguard.cli.proving.runs import Run
from stepguard.watching import trace
from stepguard.watching.replay import COMPUTATION, DATA, RANDOM, RANDOM_DIGEST, SETTINGS, STATE, is_measured
from stepguard.watching.trace import Difference, Moment, Step

_BATCH = re.compile(r"batch\b")


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """The first moment at which a run is not what the other was.

    ``restarted_at`` is the step of the last restart at or before it, ``None`` if there was none. ``batch_of`` is the
    step to which the batch belongs in the other run, ``None`` if it has no such batch.
    """

    role: str
    step: int
    what: str
    differences: tuple[Difference, ...]
    same: tuple[str, ...]
    restarted_at: int | None = None
    batch_of: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result for two runs: ``one`` is the reference.

    ``equal`` counts the tensors and values of the last state that are equal, ``steps`` the moments that were compared,
    ``batches`` those of them whose batches were; ``steps_reached`` are the last steps of both.
    """

    steps_reached: tuple[int | None, int | None]
    first: FirstDifference | None = None
    changes: tuple[Change, ...] = ()
    equal: int = 0
    steps: int = 0
    batches: int = 0
    problems: tuple[str, ...] = field(default=())

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not (self.first or self.changes or self.problems) and len(set(self.steps_reached)) == 1


def compare_runs(one: Run, other: Run, begins_at: int = 0) -> Comparison:
    """Compare two runs of one program; ``other`` began with the checkpoint of step ``begins_at``.

    Raises:
        CommandError: the framework of the checkpoints is missing.
    """
    if other.problem is not None:
        return Comparison((one.step, other.step), problems=(other.problem,))
    restarts = [begins_at, *(restart.step or begins_at for restart in other.restarts)]
    first, steps, batches = compare_traces(one.place.logdir, other.place.logdir, restarts)
    changes, equal, problems = _compare_states(one, other)
    return Comparison((one.step, other.step), first, tuple(changes), equal, steps, batches, tuple(problems))


def _compare_states(one: Run, other: Run) -> tuple[list[Change], int, list[str]]:
    if one.step != other.step:
        return [], 0, [f"it ended at step {other.step}, and the undisturbed run at step {one.step}"]
    left, right = last_state(one), last_state(other)
    if left is None or right is None:
        return [], 0, [f"no good checkpoint of its last step, {one.step}, was saved"]
    if left.engine in tensor_readers.ENGINES:
        return *compared(left, right), []
    return *_compare_files(left, right), []


def _compare_files(one: ListedCheckpoint, other: ListedCheckpoint) -> tuple[list[Change], int]:
    """Compare the digests of the files, for an engine whose tensors cannot be read."""
    left, right = (
        {file.name.partition("/")[2] or file.name: file.digest for file in listed.checkpoint.manifest.files}
        if listed.checkpoint.manifest is not None
        else {}
        for listed in (one, other)
    )
    names = sorted(left.keys() | right.keys())
    changes = [Change(name, "values") for name in names if left.get(name) != right.get(name)]
    return changes, len(names) - len(changes)


def last_state(run: Run) -> ListedCheckpoint | None:
    """The checkpoint of the last step of a run."""
    found = [one for one in list_contents(run.place.logdir).found if one.state == GOOD]
    return next((one for one in found if one.checkpoint.step == run.step), None)


def compare_traces(one: Path, other: Path, restarts: Sequence[int] = ()) -> tuple[FirstDifference | None, int, int]:
    """The first difference between the traces in two logdirs, and how many moments, and batches, were compared."""
    firsts: list[FirstDifference] = []
    steps = batches = 0
    for role in trace.roles(one):
        then, now = (trace.steps(trace.read(logdir, role)) for logdir in (one, other))
        both = [moment for moment in then if moment in now]
        steps = max(steps, len(both))
        batches = max(batches, sum(any(map(_BATCH.match, then[moment].digests)) for moment in both))
        first = first_difference(role, then, now, restarts)
        if first is not None:
            firsts.append(first)
    return min(firsts, key=lambda one: one.step, default=None), steps, batches


def first_difference(
    role: str, then: dict[Moment, Step], now: dict[Moment, Step], restarts: Sequence[int] = ()
) -> FirstDifference | None:
    """The first moment of both at which they differ, and what differs there first; ``None`` if none does.

    Random states that nobody draws from make no difference: those that only a later draw would show, and those that
    the engine does not restore, so that they differ, and nothing else does, in the first step after a restart.
    """
    found = list(_all_differences(then, now))
    restarted = [moment for moment, differences in found if moment[0] in restarts and _is_random(differences)]
    if restarted and restarted[0] == found[0][0]:
        found = [(moment, kept) for moment, one in found if (kept := [d for d in one if d.name != RANDOM_DIGEST])]
    if not found or all(_is_random(differences) for _, differences in found):
        return None
    moment, differences = found[0]
    step, before = moment[0], then[moment]
    unlike = {one.name for one in differences}
    names = [*before.settings, *before.digests, *before.numbers]
    return FirstDifference(
        role,
        step,
        what_differs(differences),
        tuple(differences),
        tuple(name for name in names if name not in unlike),
        max((one for one in restarts if one <= step), default=None),
        _step_of_batch(now[moment], then),
    )


def _all_differences(then: dict[Moment, Step], now: dict[Moment, Step]) -> Iterator[tuple[Moment, list[Difference]]]:
    for moment, before in then.items():
        if moment in now:
            found = [one for one in trace.differences(before, now[moment]) if not is_measured(one)]
            if found:
                yield moment, found


def _is_random(found: Sequence[Difference]) -> bool:
    return all(one.name == RANDOM_DIGEST for one in found)


def what_differs(found: Sequence[Difference]) -> str:
    """What differs first, in the order in which things happen in a step: the state before it, then its batch, then
    what it computes.
    """
    digests = [one.name for one in found if one.kind == "digests"]
    if any(name.startswith("state ") for name in digests):
        return STATE
    if any(one.kind == "settings" for one in found):
        return SETTINGS
    if RANDOM_DIGEST in digests:
        return RANDOM
    return DATA if any(map(_BATCH.match, digests)) else COMPUTATION


def _step_of_batch(step: Step, then: dict[Moment, Step]) -> int | None:
    batch = _batch(step)
    return next((moment[0] for moment, one in then.items() if batch and _batch(one) == batch), None)


def _batch(step: Step) -> dict[str, list[float]]:
    return {name: values for name, values in step.digests.items() if _BATCH.match(name)}
