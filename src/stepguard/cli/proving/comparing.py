"""Whether two runs are the same: their traces moment by moment, and the state of their last step, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stepguard.cli.logdir import tensor_readers
from stepguard.cli.logdir.checkpoint_changes import Change, compared
from stepguard.cli.logdir.contents import GOOD, ListedCheckpoint, list_contents
from stepguard.cli.proving.runs import Run
from stepguard.watching import trace
from stepguard.watching.replay import RANDOM_DIGEST, first_cause, is_measured
from stepguard.watching.trace import Difference, Item, Mark, Moment, Start, Step

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
    ``batches`` those of them whose batches were; ``steps_reached`` are the last steps of both. ``untraced`` counts the
    moments of the reference that the other run has not traced, so that nothing is known of them. ``measured`` are the
    names of numbers that differ and are no fault, because they say that they are measured.
    """

    steps_reached: tuple[int | None, int | None]
    first: FirstDifference | None = None
    changes: tuple[Change, ...] = ()
    equal: int = 0
    steps: int = 0
    batches: int = 0
    untraced: int = 0
    measured: tuple[str, ...] = ()
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
    traces = compare_traces(one.place.logdir, other.place.logdir, restarts, begins_at)
    changes, equal, problems = _compare_states(one, other)
    return replace(
        traces, steps_reached=(one.step, other.step), changes=tuple(changes), equal=equal, problems=tuple(problems)
    )


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


def compare_traces(one: Path, other: Path, restarts: Sequence[int] = (), begins_at: int = 0) -> Comparison:
    """Compare the traces in two logdirs, from the step ``begins_at`` on: what the other run has before was copied."""
    firsts: list[FirstDifference] = []
    measured: set[str] = set()
    steps = batches = untraced = 0
    for role in trace.roles(one):
        before, after = (trace.read(logdir, role) for logdir in (one, other))
        # A framework that counts something else than the steps of its checkpoints marks where they were taken.
        marks = {item.checkpoint_step: item.step for item in before if isinstance(item, Mark)}
        began = marks.get(begins_at, begins_at)
        then, now = _traced(before, began), _traced(after, began)
        both = [moment for moment in then.steps if moment in now.steps]
        steps = max(steps, len(both))
        batches = max(batches, sum(any(map(_BATCH.match, then.steps[moment].digests)) for moment in both))
        untraced += _untraced(then, now, {marks.get(step, step) for step in (begins_at, *restarts)})
        found = list(_all_differences(then.steps, now.steps))
        measured |= {one.name for _, differences in found for one in differences if is_measured(one)}
        first = _first(role, then.steps, now.steps, found, restarts)
        if first is not None:
            firsts.append(first)
    earliest = min(firsts, key=lambda one: one.step, default=None)
    return Comparison(
        (None, None), earliest, steps=steps, batches=batches, untraced=untraced, measured=tuple(sorted(measured))
    )


@dataclass(frozen=True, slots=True)
class _Trace:
    """What one process has traced, and the first moment that a trace, which has bounds, still has."""

    steps: dict[Moment, Step]
    since: Moment


def _traced(items: Sequence[Item], begins_at: int) -> _Trace:
    found = {moment: one for moment, one in trace.steps(items).items() if moment >= (begins_at, 0, False)}
    is_whole = not items or isinstance(items[0], Start)
    return _Trace(found, (0, 0, False) if is_whole else min(found, default=(0, 0, False)))


def _untraced(then: _Trace, now: _Trace, restarts: Container[int]) -> int:
    """How many moments of ``then`` are not in ``now``, because something has kept that trace from being written.

    What is recorded between two steps where a start goes on may belong to the time before. A program that reports by
    the clock does so at other moments in each run, of which ``now`` then has some of its own.
    """

    def missing(one: _Trace, other: _Trace) -> list[Moment]:
        known = [moment for moment in one.steps if moment[2] or moment[0] not in restarts]
        return [moment for moment in known if moment not in other.steps and moment >= other.since]

    return 0 if missing(now, then) else len(missing(then, now))


def first_difference(
    role: str, then: dict[Moment, Step], now: dict[Moment, Step], restarts: Sequence[int] = ()
) -> FirstDifference | None:
    """The first moment of both at which they differ, and what differs there first; ``None`` if none does.

    Random states that nobody draws from make no difference: those that only a later draw would show, and those that
    the engine does not restore, so that they differ, and nothing else does, in the first step after a restart.
    """
    return _first(role, then, now, list(_all_differences(then, now)), restarts)


def _first(
    role: str,
    then: dict[Moment, Step],
    now: dict[Moment, Step],
    every: Sequence[tuple[Moment, list[Difference]]],
    restarts: Sequence[int],
) -> FirstDifference | None:
    # Numbers that are measured differ in every run.
    found = [(moment, kept) for moment, one in every if (kept := [d for d in one if not is_measured(d)])]
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
        first_cause(differences),
        tuple(differences),
        tuple(name for name in names if name not in unlike),
        max((one for one in restarts if one <= step), default=None),
        _step_of_batch(now[moment], then),
    )


def _all_differences(then: dict[Moment, Step], now: dict[Moment, Step]) -> Iterator[tuple[Moment, list[Difference]]]:
    for moment, before in then.items():
        if moment in now:
            found = trace.differences(before, now[moment])
            if found:
                yield moment, found


def _is_random(found: Sequence[Difference]) -> bool:
    return all(one.name == RANDOM_DIGEST for one in found)


def _step_of_batch(step: Step, then: dict[Moment, Step]) -> int | None:
    batch = _batch(step)
    return next((moment[0] for moment, one in then.items() if batch and _batch(one) == batch), None)


def _batch(step: Step) -> dict[str, list[float]]:
    return {name: values for name, values in step.digests.items() if _BATCH.match(name)}
