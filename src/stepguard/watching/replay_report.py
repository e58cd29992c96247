"""The outcome of a comparison of steps that were done again, as one sentence."""

from __future__ import annotations

from stepguard.watching.outcome import Outcome
from stepguard.watching.replay import (
    BATCH_DIGEST,
    COMPUTATION,
    DATA,
    DIFFERS,
    RANDOM,
    RANDOM_DIGEST,
    SAME,
    SETTINGS,
    STATE,
    STATE_DIGEST,
    UNKNOWN,
    Finding,
    Replay,
)
from stepguard.watching.trace import Difference
from stepguard.words import listed

_DIGITS = range(6, 18)
_MOST_TOLD = 3

_READ = 'see "Steps that are done again" in docs/watching.md'
_LIKELY = {
    DATA: "the data order is not restored: a sampler, a shuffle or a prefetcher has a generator or a position of its "
    "own, which is not saved",
    RANDOM: "before step {step}, something has drawn more or fewer random numbers than the first time, such as an "
    "evaluation outside of sess.evaluating(), or has seeded a generator anew",
    SETTINGS: "the program sets other hyperparameters than the run before",
    STATE: "something besides the steps has changed the state",
    COMPUTATION: "the computation is not deterministic, or depends on something that is not saved",
}
_AT_ONCE = "the computation depends on something that is not saved, or is not deterministic"
_CHANGED_ITEMS = (
    "these are the same items, changed in another way: an augmentation draws random numbers that are not saved"
)
_UNKNOWN_CAUSE = (
    'to learn the cause, run it with Watching(trace="batches"), which also records batches, random states and '
    "hyperparameters"
)


def outcome_of(replay: Replay) -> Outcome | None:
    """The outcome of a comparison that is over; ``None`` if no step was done again."""
    if replay.found is not None:
        return _different(replay, replay.found)
    if replay.compared:
        return _same(replay)
    return _unknown(replay) if replay.has_passed and replay.last[0] > replay.first[0] else None


def _same(replay: Replay) -> Outcome:
    last = replay.compared[-1]
    text = f"{_range(replay.first[0], last)} done again: bit for bit the same ({_what(replay)})"
    if len(replay.compared) <= last - replay.first[0]:
        text += f"; {len(replay.compared)} of them could be compared"
    if replay.begins is not None and replay.begins > replay.first[0]:
        text += f"; those before step {replay.begins} are no longer in the trace"
    if last < replay.last[0]:
        text += f"; the first time, the run came to step {replay.last[0]}"
    if replay.measured:
        text += f"; not compared, because their names say that they are measured: {listed(replay.measured, most=3)}"
    return _outcome(replay, SAME, last, text)


def _what(replay: Replay) -> str:
    """What was compared."""
    digests = {BATCH_DIGEST: "batches", RANDOM_DIGEST: "random states", STATE_DIGEST: "state"}
    found = [text for start, text in digests.items() if any(one.startswith(start) for one in replay.names)]
    numbers = [one for one in replay.names if not one.startswith(tuple(digests)) and one not in replay.measured]
    return listed([*found, *numbers]) or "only numbers that are measured"


def _unknown(replay: Replay) -> Outcome:
    if replay.is_changed:
        why = "another number of processes trains now"
    else:
        why = (
            f"nothing was recorded again under the same name; the first time there were "
            f"{listed(replay.then_names, most=3)}"
        )
    last = replay.last[0]
    return _outcome(replay, UNKNOWN, last, f"{_range(replay.first[0], last)} done again and cannot be compared: {why}")


def _different(replay: Replay, found: Finding) -> Outcome:
    step = found.moment[0]
    parts = [f"{one} the same" for one in _grouped(found)]
    parts += [_told(one, found.source) for one in found.differences[:_MOST_TOLD]]
    more = len(found.differences) - _MOST_TOLD
    parts += [f"and {more} more differ"] if more > 0 else []
    text = f"step {step} is not what it was: {', '.join(parts)}: {_reason(replay, found)}; {_READ}"
    if replay.compared[:-1]:
        text = f"{_range(replay.first[0], replay.compared[-2])} done again bit for bit; {text}"
    return _outcome(replay, DIFFERS, step, text, found)


def _grouped(found: Finding) -> list[str]:
    """What is the same: a batch, or the state, of which nothing differs as a whole; the numbers at the end."""
    unlike = [one.name for one in found.differences]
    wholes = {BATCH_DIGEST: "batch", STATE_DIGEST: "state", RANDOM_DIGEST: RANDOM, SETTINGS: SETTINGS}
    digests, numbers = [], []
    for name in found.same:
        kind = next((one for one in wholes if name.startswith(one)), None)
        if kind is None:
            numbers.append(name)
        else:
            digests.append(name if any(one.startswith(kind) for one in unlike) else wholes[kind])
    return [*dict.fromkeys(digests), *numbers[:_MOST_TOLD]]


def _short(name: str) -> str:
    return {RANDOM_DIGEST: RANDOM}.get(name, name)


def _told(one: Difference, source: str) -> str:
    if one.kind == "digests":
        is_batch = one.name.startswith(BATCH_DIGEST) and source
        return f"{_short(one.name)} of {source} differs" if is_batch else f"{_short(one.name)} differs"
    then, now = _apart(one.then, one.now)
    return f"{one.name} {then} then, {now} now"


def _apart(then: float, now: float) -> tuple[str, str]:
    """Two numbers, with as many digits as show that they differ."""
    shown = ((f"{then:#.{digits}g}", f"{now:#.{digits}g}") for digits in _DIGITS)
    return next((one for one in shown if one[0] != one[1]), (repr(then), repr(now)))


def _reason(replay: Replay, found: Finding) -> str:
    cause = found.cause
    if cause is None:
        return _UNKNOWN_CAUSE
    if cause == DATA and any(one.startswith(BATCH_DIGEST) for one in found.same):
        return _CHANGED_ITEMS
    if cause == COMPUTATION and found.moment == replay.first:
        return _AT_ONCE
    return _LIKELY[cause].format(step=found.moment[0])


def _range(first: int, last: int) -> str:
    return f"step {first} was" if first >= last else f"steps {first} to {last} were"


def _outcome(replay: Replay, outcome: str, to_step: int, message: str, found: Finding | None = None) -> Outcome:
    at = None if found is None else found.moment[0]
    cause = None if found is None else found.cause
    return Outcome(replay.first[0], to_step, outcome, len(replay.compared), at, cause, message)
