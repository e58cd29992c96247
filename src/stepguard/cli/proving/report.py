"""The verdict for a person, at 80 columns, and for a program."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepguard.cli.proving.causes import parts
from stepguard.cli.proving.proof import (
    AGAIN,
    DIFFERENT,
    NOT_DETERMINISTIC,
    NOT_TRIED,
    UNDISTURBED,
    Options,
    Result,
    Verdict,
)
from stepguard.cli.text import output
from stepguard.words import listed, printable

WIDTH = 80
_TITLE = 23
_SAME, _OTHER, _UNTRIED = "same run, bit for bit", "NOT the same run", "not tried"
_NAMES = {
    "sigterm": "stopped by SIGTERM",
    "interrupt": "stopped by Ctrl-C",
    "damage": "newest one damaged",
    "disk": "full disk",
    "process": "one process killed",
}


def name_of(argv: Sequence[str]) -> str:
    """The name of a program: its first argument that is a Python file, or the program itself."""
    return next((Path(one).name for one in argv if one.endswith(".py")), Path(argv[0]).name)


def title(result: Result) -> str:
    """The title of a line."""
    if result.kind == UNDISTURBED:
        return UNDISTURBED
    if result.kind == AGAIN:
        return "begun again"
    if result.kind == "kill":
        count = len(result.run.restarts)
        return "killed once" if count == 1 else f"killed {count} times"
    return _NAMES[result.kind]


def line(result: Result, begins_at: int) -> str:
    """One line of the verdict; all runs but the first begin at ``begins_at``."""
    done = result.run
    steps = f"{done.step} steps" if done.problem is None else "not done"
    if result.kind == UNDISTURBED:
        return f"{title(result):<{_TITLE}}{steps}, {done.secs:.1f} s"
    if done.problem is not None:
        text = "did not come to its end"
    elif not result.is_tried:
        text = _why_untried(result)
    elif result.kind == "disk":
        text = f"{steps}, training went on"
    elif result.kind == AGAIN:
        text = f"{steps}, from step {begins_at} on"
    else:
        text = f"{steps}, {done.again} of them done again" if done.again else f"{steps}, 0 done again"
    outcome = (_SAME if result.is_tried else _UNTRIED) if result.is_same else _OTHER
    left = f"{title(result):<{_TITLE}}{text} "
    return f"{left}{'.' * (WIDTH - len(left) - len(_SAME) - 1)} {outcome}"


def _why_untried(result: Result) -> str:
    if result.comparison is not None and result.comparison.untraced:
        return f"{result.comparison.untraced} steps left no trace"
    return "; ".join(dict.fromkeys(one.partition(": ")[2] for one in result.run.missed))


def details(result: Result) -> Iterator[str]:
    """Which of its faults were left out, and why; where and why a run is not the same, and what to do."""
    comparison, cause = result.comparison, result.cause
    if result.is_tried:
        for missed, count in Counter(result.run.missed).items():
            kind, _, why = missed.partition(": ")
            yield from _wrapped(f"left out: {kind}, {output.counted(count, 'time')}: {why}")
    if comparison is None or cause is None:
        return
    yield from _wrapped(printable(cause.what))
    if comparison.changes:
        first = comparison.changes[0]
        yield from _wrapped(f"the last state differs in {parts(comparison.changes)}; for one, {printable(first.name)}")
    yield from _wrapped(f"likely: {cause.likely}")
    yield from _wrapped(f"repair: {cause.repair}")
    yield from _wrapped(f"its logdir is kept: {printable(str(result.run.place.logdir))}")


def _wrapped(text: str, first: str = "  ", then: str = "    ") -> list[str]:
    # A path is never broken.
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=then, break_long_words=False, break_on_hyphens=False
    )


def conclusion(verdict: Verdict, argv: Sequence[str], options: Options) -> Iterator[str]:
    """The last lines."""
    for remark in verdict.remarks:
        yield from _wrapped(f"note: {remark}", "", "  ")
    measured = _measured(verdict)
    if measured:
        yield from _wrapped(
            f"note: not compared, because the names say that they are measured: "
            f"{listed([printable(one) for one in measured], most=3)}",
            "",
            "  ",
        )
    name = printable(name_of(argv))
    if verdict.verdict == NOT_DETERMINISTIC:
        found = verdict.results[-1].comparison
        first = None if found is None else found.first
        until = "" if first is None else f" The steps before step {first.step} are the same."
        yield from textwrap.wrap(
            f"NOT DETERMINISTIC: two undisturbed runs of {name} differ, so that nothing can be said of a resumed one."
            f"{until}",
            WIDTH,
        )
        return
    bad = [title(one) for one in verdict.results[1:] if not one.is_same]
    if verdict.verdict == DIFFERENT:
        yield from textwrap.wrap(f"NOT PROVEN for {name}: not the same run when {', '.join(bad)}.", WIDTH)
        return
    untried = [title(one) for one in verdict.results[1:] if not one.is_tried]
    if verdict.verdict == NOT_TRIED:
        yield from textwrap.wrap(f"NOT ALL TRIED for {name}: {', '.join(untried)}. The rest is proven.", WIDTH)
    else:
        yield from textwrap.wrap(f"PROVEN for {name}: {_counts(verdict)}. {_costs(verdict, options)}", WIDTH)


def _counts(verdict: Verdict) -> str:
    found = [one.comparison for one in verdict.results if one.comparison is not None]
    equal, batches, steps = (max(getattr(one, name) for one in found) for name in ("equal", "batches", "steps"))
    restarts = sum(len(one.run.restarts) for one in verdict.results)
    seen = f"{batches} batches" if batches else f"the numbers of {steps} steps" if steps else "no numbers of steps"
    return f"{equal:,} tensors and values, {seen}, {output.counted(restarts, 'restart')}"


def _costs(verdict: Verdict, options: Options) -> str:
    return (
        f"A save each {options.spacing} steps stops the training {verdict.longest_stall_secs * 1000:.1f} ms at most, "
        f"{verdict.stall_share:.1%} of the time."
    )


def _measured(verdict: Verdict) -> list[str]:
    found = [one.comparison.measured for one in verdict.results if one.comparison is not None]
    return sorted({name for names in found for name in names})


def document(verdict: Verdict, argv: Sequence[str], options: Options) -> dict[str, Any]:
    """The verdict as one JSON document."""
    return {
        "verdict": verdict.verdict,
        "program": list(argv),
        "steps": verdict.results[0].run.step if verdict.results else None,
        "seed": options.seed,
        "begins_at": verdict.begins_at,
        "longest_stall_secs": round(verdict.longest_stall_secs, 4),
        "stall_share": round(verdict.stall_share, 4),
        "remarks": verdict.remarks,
        "measured": _measured(verdict),
        "runs": [_run(one) for one in verdict.results],
    }


def _run(result: Result) -> dict[str, Any]:
    done, found = result.run, result.comparison
    first = None if found is None else found.first
    return {
        "kind": result.kind,
        "same": None if found is None else found.is_same,
        "tried": result.is_tried,
        "step": done.step,
        "secs": round(done.secs, 2),
        "restarts": [{**asdict(one), "again": one.again} for one in done.restarts],
        "missed": done.missed,
        "steps_compared": None if found is None else found.steps,
        "batches_compared": None if found is None else found.batches,
        "steps_untraced": None if found is None else found.untraced,
        "equal": None if found is None else found.equal,
        "changes": [] if found is None else [asdict(one) for one in found.changes],
        "first_difference": None if first is None else asdict(first),
        "cause": None if result.cause is None else asdict(result.cause),
        "logdir": None if result.is_same else str(done.place.logdir),
    }
