"""Compares the steps that a resumed session does again with what they were the first time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stepguard.watching import trace
from stepguard.watching.trace import Difference, Item, Moment, Record, Start, Step

SAME, DIFFERS, UNKNOWN = "same", "differs", "unknown"
DATA, RANDOM, SETTINGS, STATE, COMPUTATION = "data", "random state", "hyperparameters", "state", "computation"

BATCH_DIGEST = "batch"
"""How the names of the digests of a batch begin; each of its parts has one."""
RANDOM_DIGEST = "random"
STATE_DIGEST = "state "

# The names of numbers that are measured, so that they differ between two runs that are the same.
_MEASURED = re.compile(
    r"(?:^|[^a-z])(?:secs?|seconds?|ms|msecs?|minutes?|hours?|times?|wall\w*|elapsed|duration|eta|latency|speed|"
    r"throughput|fps|ips|mfu|gpu|cpu|mem|memory|rss|\w+_per_\w+|\w+/s(?:ec)?)(?:$|[^a-z])",
    re.IGNORECASE,
)
# The last word of names that a model computes, whatever is before it: "memory/loss" and "speed_error" are compared.
_COMPUTED = re.compile(
    r"(?:^|[^a-z])(?:loss|losses|err|errors?|mse|rmse|mae|acc|accuracy|precision|recall|f1|auc|score|reward|return|"
    r"norm|grads?|gradient|logits?|prob\w*|entropy|kl|perplexity|ppl|bleu|lr|weights?|bias)[^a-z]*$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The first moment that is not what it was: what differs there, what is the same, and what it was and is."""

    moment: Moment
    differences: Sequence[Difference]
    same: Sequence[str]
    cause: str | None
    source: str


class Replay:
    """Compares the records of a resumed session with those of the sessions before. One thread at a time.

    The comparison begins with the first step that is done again. What was recorded before that step, and after the one
    before it, is left out: the checkpoint may be younger than it, so that it is not done again.

    Args:
        before: the trace up to the start of this session.
        start: where this session continues.
        is_whole: whether that trace has everything from ``start`` on.
    """

    def __init__(self, before: Sequence[Item], start: Start, *, is_whole: bool = True) -> None:
        known = trace.steps(before) if start.is_resumed else {}
        self.first: Moment = start.step, start.epochs, True
        self._then = {moment: one for moment, one in known.items() if moment >= self.first}
        self.last: Moment = max(self._then, default=self.first)
        self.is_changed = start.processes != _processes(before, start.processes)
        # The first step of which the trace still knows, if it has lost older ones.
        self.begins = None if is_whole else min(known, default=self.first)[0]
        self._settings_now: dict[str, float] = {}
        self._settings_then: dict[str, float] = {}
        for moment, one in known.items():
            if moment <= self.first:
                self._settings_then.update(_newest(one))
        # The moments whose settings are not in force yet.
        self._coming = [moment for moment, one in self._then.items() if one.settings][::-1]
        self._moment: Moment | None = None
        self._now = Step()
        self.compared: list[int] = []
        self.names: dict[str, None] = {}
        self.measured: dict[str, None] = {}
        self.source = ""
        """The loader of the running step, for messages."""
        self.found: Finding | None = None
        self.is_over = not self._then
        self.has_passed = False
        """Whether this session has come further than the ones before."""

    @property
    def then_names(self) -> list[str]:
        """The names of numbers and digests that were recorded the first time."""
        return sorted({name for one in self._then.values() for name in (*one.numbers, *one.digests)})

    def see(self, record: Record) -> None:
        """Take a record of this session."""
        moment = record.moment
        if moment != self._moment:
            self._close()
            # A moment before the last one follows a return of the run to a checkpoint.
            self.has_passed = self.has_passed or moment > self.last
            self.is_over = self.is_over or self.has_passed or (self._moment is not None and moment < self._moment)
            self._moment, self._now = moment, Step()
        self._now.add(record)

    def end(self) -> None:
        """The session ends, perhaps in the middle of a step: compare what there is of that."""
        self._close()
        self.is_over = True

    def _close(self) -> None:
        """Compare the moment that is over."""
        moment, now = self._moment, self._now
        then = None if moment is None else self._then.get(moment)
        if moment is None or then is None or self.is_over or self.is_changed:
            return
        names = [one for one in (*then.digests, *then.numbers) if one in now.digests or one in now.numbers]
        found = [
            *self._other_settings(moment),
            *(one for one in trace.differences(then, now) if one.kind != "settings"),
        ]
        measured = {one.name for one in found if is_measured(one)}
        found = [one for one in found if one.name not in measured]
        self.measured.update(dict.fromkeys(sorted(measured)))
        if not found and not names:
            return
        if not self.compared or self.compared[-1] != moment[0]:
            self.compared.append(moment[0])
        self.names.update(dict.fromkeys(names))
        if found:
            unlike = {one.name for one in found}
            same = [one for one in names if one not in unlike and one not in self.measured]
            if self._settings_now and not any(one.kind == "settings" for one in found):
                same.append(SETTINGS)
            self.found = Finding(moment, found, same, _cause(found, same), self.source)
            self.is_over = True

    def _other_settings(self, moment: Moment) -> list[Difference]:
        while self._coming and self._coming[-1] <= moment:
            self._settings_then.update(_newest(self._then[self._coming.pop()]))
        then, now = self._settings_then, self._settings_now
        now.update(_newest(self._now))
        names = [one for one in then if one in now and not trace.is_same(then[one], now[one])]
        return [Difference("settings", name, then[name], now[name]) for name in names]


def first_cause(found: Sequence[Difference]) -> str:
    """The cause that the differences of one moment point to: "computation" if only numbers differ.

    The order is that in which one thing decides the next. The random states and the hyperparameters of a step are no
    result of its model's state, and what is drawn decides the batch; but all of them decide what the model becomes.
    """
    digests = [one.name for one in found if one.kind == "digests"]
    if RANDOM_DIGEST in digests:
        return RANDOM
    if any(one.startswith(BATCH_DIGEST) for one in digests):
        return DATA
    if any(one.kind == "settings" for one in found):
        return SETTINGS
    return STATE if digests else COMPUTATION


def _cause(found: Sequence[Difference], same: Sequence[str]) -> str | None:
    """What the differences of the first moment that differs tell of their cause; ``None`` if they tell nothing."""
    cause = first_cause(found)
    return cause if cause != COMPUTATION or RANDOM_DIGEST in same else None


def _newest(step: Step) -> dict[str, float]:
    return {name: values[-1] for name, values in step.settings.items()}


def _processes(before: Sequence[Item], otherwise: int) -> int:
    """The number of processes of the newest start."""
    return next((one.processes for one in reversed(before) if isinstance(one, Start)), otherwise)


def is_measured(one: Difference) -> bool:
    """Whether this number is measured, such as a time, so that it differs between two runs that are the same."""
    return one.kind == "numbers" and bool(_MEASURED.search(one.name)) and not _COMPUTED.search(one.name)
