"""Why two runs differ, as far as their traces can tell, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from stepguard.cli.logdir.checkpoint_changes import Change
from stepguard.cli.proving.comparing import Comparison, FirstDifference
from stepguard.cli.text import output
from stepguard.watching.replay import COMPUTATION, DATA, RANDOM, SETTINGS, STATE


@dataclass(frozen=True, slots=True)
class Cause:
    """``what`` says what differs, ``likely`` the probable cause, and ``repair`` what to do."""

    name: str
    what: str
    likely: str
    repair: str


# By what differs first: the likely cause, and the repair.
_OF_A_RESUME = {
    RANDOM: (
        "something drew random numbers at another moment than before: an evaluation, or work that counts from the "
        "start of the process",
        "put it into `with sess.evaluating():`, or draw from a generator of its own that is in the state",
    ),
    SETTINGS: (
        "a hyperparameter is not part of the saved state",
        "give its scheduler or optimizer to the Supervisor, or compute it from the global step",
    ),
    STATE: (
        "the restored state is not the one that was saved",
        "look for code that changes it between the restore and the first step",
    ),
}
_NOT_SAVED = (
    "something that the step uses is not in the saved state: gradients that were not applied, an average, a counter, a "
    "buffer of the program's own",
    "give it to the Supervisor, in stepguard.torch.Values say; accumulate with sess.steps(..., accumulate=n)",
)


def of_two_undisturbed(found: Comparison) -> Cause:
    """The cause of a difference between two undisturbed runs."""
    first = found.first
    if first is None:
        return Cause(
            "computation",
            "every step that was traced is the same, and the last state is not",
            "the computation is not deterministic, or steps report no numbers",
            "try --deterministic; report a number of each step, for example sess.summary({'loss': loss})",
        )
    where = _where(first)
    if first.what == DATA:
        return Cause(
            "unseeded",
            f"{where} {_differs(first)}",
            "a generator without a seed draws in the data: an augmentation, a sampler or a worker",
            "seed it from the seed of the run, or draw from the global generators, which are saved",
        )
    if first.what == RANDOM:
        return Cause(
            "random state",
            f"{where} {_differs(first)}",
            "something draws at other moments in each start: a thread, or work on a timer",
            "draw from a generator of its own there, or put it into `with sess.evaluating():`",
        )
    return Cause(
        "computation",
        f"{where} {_differs(first)}",
        "the computation is not deterministic: kernels that add in any order, or threads that race",
        "try --deterministic, which sets what the frameworks offer",
    )


def of_a_disturbed_run(found: Comparison) -> Cause:
    """The cause of a difference between an undisturbed run and one that was resumed."""
    first = found.first
    if found.problems:
        return Cause(
            "end",
            "; ".join(found.problems),
            "a start that goes on from a checkpoint does not come to the end of one that begins anew",
            "the message above says it; --show-output shows all that the program prints",
        )
    if first is None:
        return Cause(
            "state",
            "every step that was traced is the same, and the last state is not",
            f"a part of the state is not restored: {parts(found.changes)}",
            "give the Supervisor every object that the training changes; report a number of each step, so that the "
            "first step that differs can be named",
        )
    where = _where(first)
    if first.what == DATA:
        return _of_data(first, where)
    likely, repair = _OF_A_RESUME.get(first.what, _NOT_SAVED)
    if first.what in (SETTINGS, STATE):
        likely = f"{likely}: {_names(first)}"
    return Cause(first.what, f"{where} {_differs(first)}", likely, repair)


def _of_data(first: FirstDifference, where: str) -> Cause:
    of = first.batch_of
    ahead = None if of is None else of - first.step
    if ahead is not None and ahead > 0:
        skipped = "1 batch was" if ahead == 1 else f"{ahead} batches were"
        return Cause(
            DATA,
            f"{where} the batch is that of step {of}: {skipped} skipped",
            "something reads ahead of the training, such as a prefetcher around the loader; what it had read is lost",
            "prefetch inside the loader (num_workers, prefetch_factor), and give sess.steps the loader itself",
        )
    if ahead is not None:
        return Cause(
            DATA,
            f"{where} the batch is that of step {of}, which comes again",
            "the data begins anew at each start: a sampler with a generator of its own, or a lost position",
            "draw from the global generators, or pass generator= to the loader; give sess.steps the loader itself, and "
            "not an iterator over it",
        )
    return Cause(
        DATA,
        f"{where} {_differs(first)}",
        "the order of the data is not restored: a sampler with a generator of its own, or an augmentation that draws "
        "from one",
        "draw from the global generators, or pass generator= to the loader, or give the sampler a state_dict",
    )


def _where(first: FirstDifference) -> str:
    role = "" if first.role == "chief" else f"in {first.role}, "
    if first.restarted_at is None:
        return f"{role}step {first.step}:"
    later = first.step - first.restarted_at
    after = "the first after" if later == 0 else f"{later} after"
    return f"{role}step {first.step}, {after} the restart at {first.restarted_at}:"


_WORDS = {
    DATA: ("the batch", "batch"),
    RANDOM: ("the random state", "random state"),
    SETTINGS: ("a hyperparameter", "hyperparameters"),
    STATE: ("the state", "state"),
    COMPUTATION: ("what it computes", "numbers"),
}


def _differs(first: FirstDifference) -> str:
    """For example "the batch is another, random state the same" or "loss 0.0562031 then, 0.056203 now"."""
    same = _same(first)
    numbers = [one for one in first.differences if one.kind in ("numbers", "settings")]
    told = [f"{one.name} {one.then:.9g} then, {one.now:.9g} now" for one in numbers[:2]]
    if first.what in (COMPUTATION, SETTINGS) and told:
        return "; ".join([*told, *same])
    return f"{_WORDS[first.what][0]} is another" + "".join(f", {one}" for one in same)


def _same(first: FirstDifference) -> list[str]:
    kinds = []
    if first.what != RANDOM and "random" in first.same:
        kinds.append("random state")
    if first.what != DATA and any(name.startswith("batch") for name in first.same):
        kinds.append("batch")
    return [f"{' and '.join(kinds)} the same"] if kinds else []


def _names(first: FirstDifference) -> str:
    kind = "settings" if first.what == SETTINGS else "digests"
    return ", ".join(sorted(one.name.removeprefix("state ") for one in first.differences if one.kind == kind)[:4])


def parts(changes: tuple[Change, ...]) -> str:
    """The parts of the state that differ, each with its largest difference, for example "model 0.003"."""
    largest: dict[str, float | int | None] = {}
    for one in changes:
        part = one.name.split(".", 1)[0]
        size = None if one.difference is None else one.difference.absolute
        known = largest.get(part)
        if part not in largest or (isinstance(size, (int, float)) and (known is None or size > known)):
            largest[part] = size
    shown = [f"{part}{'' if size is None else f' (by {output.number(size)})'}" for part, size in largest.items()]
    more = f", and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + more
