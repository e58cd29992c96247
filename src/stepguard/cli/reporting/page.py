"""The page of a report: one HTML file that needs no other, and can fetch none.

Its policy (Content-Security-Policy) allows its own two scripts, known by their digests, and forbids every address. What
comes from a logdir is text: `markup` escapes it, and `charts` for Plotly. So a name that holds HTML is shown as it is
and, if that ever failed, still could not run.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from stepguard import __version__
from stepguard.cli.logdir.contents import DAMAGED, GOOD
from stepguard.cli.logdir.event_files import Curve
from stepguard.cli.logdir.story import BAD, Entry
from stepguard.cli.logdir.story import GOOD as FINE
from stepguard.cli.reporting import charts
from stepguard.cli.reporting.gathering import MOST_CURVES, CheckpointRow, RunFacts
from stepguard.cli.reporting.markup import Markup, coloured, element, joined, table
from stepguard.cli.text import output
from stepguard.watching import configuration
from stepguard.watching.history import CHIEF
from stepguard.watching.redaction import without_secrets
from stepguard.words import duration, listed

_MOST_ROWS = 100
_MOST_STARTS = 50
_KINDS = {FINE: "good", BAD: "bad", "yellow": "trouble"}
_OUTCOMES = {"same": "good", "differs": "bad", "unknown": "trouble"}


def written(facts: RunFacts) -> str:
    """The page. Raises CommandError if Plotly is not installed."""
    plotly = charts.load()
    figures = _Figures(plotly)
    sections = [
        ("happened", "What happened", _happened(facts, figures)),
        ("numbers", "Numbers", _numbers(facts, figures)),
        ("checkpoints", "Checkpoints", _checkpoints(facts)),
        ("costs", "What it cost", _costs(facts, figures)),
        ("again", "Steps done again", _again(facts)),
        ("configuration", "Configuration", _configuration(facts)),
    ]
    body = element(
        "main",
        _head(facts),
        element("nav", *(element("a", title, href=f"#{name}") for name, title, _ in sections)),
        _tiles(facts),
        *(element("section", element("h2", title), *content, id=name) for name, title, content in sections),
        _foot(facts),
    )
    scripts = [charts.script(plotly), resources.files(__package__).joinpath("page.js").read_text("utf-8")]
    style = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            element("title", f"{facts.logdir.absolute().name}: a run"),
            f"<style>{style}</style></head><body>",
            body,
            *figures.elements,
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        )
    )


def _policy(scripts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in digests)
    # Plotly styles its elements itself.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class _Figures:
    """The charts of the page: ``elements`` are their data, for the end of it."""

    def __init__(self, plotly: Any) -> None:
        self._plotly = plotly
        self.elements: list[str] = []

    def card(self, title: str, figure: Mapping[str, Any], *notes: str) -> Markup:
        """The place of a chart, with its title."""
        name = f"chart-{len(self.elements)}"
        found = charts.as_json(self._plotly, dict(figure))
        self.elements.append(f'<script type="application/json" id="{name}">{found}</script>')
        place = element("div", data_chart=name, role="img", aria_label=title)
        head = [element("h3", title)] if title else []
        return element("div", *head, place, *(element("p", one, class_="quiet") for one in notes), class_="card")


# --- the head ---


def _head(facts: RunFacts) -> Markup:
    chief = next((one for one in facts.state.processes if one.beat.role == CHIEF), None)
    if chief is None:
        state = coloured("no process has told of itself", "plain")
    else:
        text = f"stopped: {chief.beat.reason or 'unknown'}" if chief.state == "stopped" else chief.state
        kind = "good" if chief.is_well else "trouble" if chief.state == "silent" else "bad"
        state = coloured("alive, and hangs" if chief.hangs else text, kind)
    error = [element("p", facts.state.last_error, class_="trouble")] if facts.state.last_error else []
    path = element("p", element("code", str(facts.logdir.absolute())), " · ", state)
    return element("header", element("h1", facts.logdir.absolute().name or "/"), path, *error)


def _tiles(facts: RunFacts) -> Markup:
    found, told = facts.history, facts.told
    chief = next((one.beat for one in facts.state.processes if one.beat.role == CHIEF), None)
    good = facts.state.newest_good
    starts = len(found.attempts)
    trained = found.productive_secs + found.replayed_secs
    whole = trained + found.down_secs
    return element(
        "div",
        _tile("-" if chief is None or chief.step is None else f"{chief.step:,}", _of_steps(facts)),
        _tile(f"{starts:,}", f"{'start' if starts == 1 else 'starts'}, {found.restarts:,} after a crash"),
        _tile(f"{found.lost_steps:,}", "steps done again"),
        _tile(_share(found.productive_secs, whole), f"productive, of {duration(whole)}"),
        _tile(
            "none"
            if good is None
            else f"step {good.checkpoint.step:,}"
            if good.checkpoint.step is not None
            else "good",
            "the newest good checkpoint" if good is not None else "no good checkpoint",
        ),
        _tile(f"{told.costs.saves.count:,}", f"saves; training waited {_share(told.costs.stall_secs, trained)}"),
        class_="tiles",
    )


def _tile(number: str, label: str) -> Markup:
    return element("div", element("b", number), element("span", label), class_="tile")


def _of_steps(facts: RunFacts) -> str:
    chief = next((one.beat for one in facts.state.processes if one.beat.role == CHIEF), None)
    return f"steps of {chief.total_steps:,}" if chief is not None and chief.total_steps else "steps"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %" if whole > 0 else "-"


# --- what happened ---


def _happened(facts: RunFacts, figures: _Figures) -> Iterator[Markup]:
    attempts = facts.history.attempts
    if any(one.first_step is not None for one in attempts):
        yield figures.card("", charts.timeline(facts), "Each line is a start: the step that the run was at, over time.")
    numbered = list(enumerate(attempts))
    shown = numbered[-_MOST_STARTS:]
    if shown:
        rows = [
            (
                str(number + 1),
                _when(one.started),
                duration(one.ended - one.started),
                "-" if one.first_step is None else f"{one.first_step:,}",
                "-" if one.last_step is None else f"{one.last_step:,}",
                _end(facts, number),
                f"{one.pid} on {one.host}",
            )
            for number, one in reversed(shown)
        ]
        titles = ("Start", "When", "For", "From step", "To step", "End", "Process")
        yield table(titles, rows, numbers=(0, 2, 3, 4))
        yield from _not_shown(len(numbered) - len(shown), "earlier starts")
    else:
        yield element("p", "No ledger tells of a start.")
    if facts.unreadable:
        yield element("h3", "What could not be read, and was passed over")
        yield element("ul", *(element("li", one) for one in facts.unreadable[:_MOST_ROWS]))
    yield from _story(facts)


def _end(facts: RunFacts, number: int) -> Markup:
    reason = facts.history.attempts[number].reason
    text = facts.end_of(number)
    is_bad = reason == "error" or text == "ended without a word"
    return coloured(text, "bad" if is_bad else "good" if reason == "finished" or text == "runs" else "plain")


def _story(facts: RunFacts) -> Iterator[Markup]:
    told = facts.told
    trouble = [one for one in told.entries if one.is_trouble]
    if trouble:
        yield element("h3", f"What went wrong ({told.troubles:,})")
        yield _entries(trouble[-_MOST_ROWS:])
        yield from _not_shown(told.troubles - min(len(trouble), _MOST_ROWS), "earlier")
    if told.entries:
        summary = element("summary", f"The story, without the saves: {output.counted(told.entries_told, 'line')}")
        rest = joined(_not_shown(told.entries_told - len(told.entries), "earlier lines"))
        yield element("details", summary, _entries(list(told.entries)), rest)


def _entries(entries: Sequence[Entry]) -> Markup:
    rows = [(_when(one.time), one.role, coloured(one.text, _KINDS.get(one.colour or "", "plain"))) for one in entries]
    return table(("When", "Process", "What"), rows)


def _not_shown(count: int, what: str) -> Iterator[Markup]:
    if count > 0:
        yield element("p", f"{count:,} {what} are not shown: `stepguard log` tells all.", class_="quiet")


# --- numbers ---


def _numbers(facts: RunFacts, figures: _Figures) -> Iterator[Markup]:
    if not facts.curves:
        yield element("p", "The program has reported no numbers that were asked for.")
        return
    restarts = [one.first_step for one in facts.history.attempts[1:] if one.first_step]
    marked = "; dotted lines: where a start has gone on" if restarts else ""
    yield element("p", f"From {facts.curves_of}, over the steps{marked}.", class_="quiet")
    cards = [figures.card(one.tag, charts.curve(one, restarts), _caption(one)) for one in facts.curves]
    yield element("div", *cards, class_="charts")
    if facts.left_out:
        text = f"Not drawn, since {MOST_CURVES} are: {listed(facts.left_out, most=50)}. Choose with --tag."
        yield element("p", text, class_="quiet")


def _caption(one: Curve) -> str:
    finite = one.finite
    least, most = _number(min(finite, default=None)), _number(max(finite, default=None))
    strange = len(one.values) - len(finite)
    first = next((step for step, value in zip(one.steps, one.values, strict=True) if value - value != 0), None)
    text = f"last {_number(one.values[-1])} at step {one.steps[-1]:,}; from {least} to {most}"
    return text if first is None else f"{text}; {strange:,} not finite, the first at step {first:,}"


def _number(value: float | None) -> str:
    """As in a table of the command line, but ``1,276`` rather than ``1.28e+03``."""
    return f"{value:,.0f}" if value is not None and 1000 <= abs(value) < 1e6 else output.number(value)


# --- checkpoints ---


def _checkpoints(facts: RunFacts) -> Iterator[Markup]:
    rows = facts.checkpoints
    if not rows:
        yield element("p", "There is no checkpoint.")
    else:
        shown = sorted(rows, key=_rank)[:_MOST_ROWS]
        shown.sort(key=lambda one: (one.time, one.step or 0), reverse=True)
        titles = ("Step", "State", "Saved", "Size", "Kept", "Metrics", "Name")
        yield table(titles, map(_row, shown), numbers=(0, 3))
        if len(rows) > len(shown):
            text = f"{len(rows) - len(shown):,} older ones are not shown: "
            yield element("p", text, element("code", "stepguard ls"), " has all.", class_="quiet")
        verify = element("code", "stepguard verify")
        yield element("p", "Sizes and names are compared here; ", verify, " reads every byte.", class_="quiet")
    if facts.contents.quarantined:
        text = f"{output.counted(facts.contents.quarantined, 'damaged checkpoint')} in quarantine/."
        yield element("p", coloured(text, "bad"))
    if facts.state.mirror is not None:
        yield element("p", *without_secrets([output.mirror(facts.state.mirror)]))


def _rank(one: CheckpointRow) -> tuple[bool, float]:
    """What is kept, damaged or next comes before the newest of the others."""
    return not (one.kept or one.is_next or one.state == DAMAGED), -one.time


def _row(one: CheckpointRow) -> tuple[str, ...]:
    kind = "good" if one.state == GOOD else "bad" if one.state == DAMAGED else "trouble"
    reasons = [": " + listed(one.reasons, separator="; ")] if one.reasons and one.state != GOOD else []
    return (
        "-" if one.step is None else f"{one.step:,}",
        joined((coloured(one.state, "plain" if one.state == "mirrored" else kind), *reasons)),
        _when(one.time),
        output.size(one.bytes),
        ", ".join([*([one.kept] if one.kept else []), *(["next to be restored"] if one.is_next else [])]),
        ", ".join(f"{name} {value:.4g}" for name, value in sorted(one.metrics.items())),
        one.name,
    )


# --- costs ---


def _costs(facts: RunFacts, figures: _Figures) -> Iterator[Markup]:
    found, costs = facts.history, facts.told.costs
    trained = found.productive_secs + found.replayed_secs
    if trained + found.down_secs > 0:
        yield figures.card("Where the time went", charts.time_spent(facts))
    count = costs.saves.count
    if not count:
        yield element("p", "The ledger has no save.")
        return
    yield element(
        "div",
        figures.card("Seconds that a save took, beside training", charts.saves(facts, stalls=False)),
        figures.card("Milliseconds that training waited for a save", charts.saves(facts, stalls=True)),
        class_="charts",
    )
    rows = [
        ("saves", f"{count:,}", f"{output.size(costs.bytes)} in all, {output.size(costs.bytes // count)} each"),
        ("training waited", _secs(costs.stall_secs), f"{_share(costs.stall_secs, trained)} of training; "
         f"{_secs(costs.longest_stall_secs)} at most"),
        ("writing, beside training", _secs(costs.secs), f"{_secs(costs.longest_secs)} at most"),
    ]  # fmt: skip
    if costs.sent:
        what = f"{output.size(costs.sent_bytes)} sent in {_secs(costs.sent_secs)}"
        rows.append(("copies in the mirror", f"{costs.sent:,}", what))
    rows += [
        ("steps done again", f"{found.lost_steps:,}", _secs(found.replayed_secs)),
        ("down", output.counted(found.restarts, "restart"), _secs(found.down_secs)),
    ]
    yield table(("What", "How much", "Of which"), rows)


def _secs(secs: float) -> str:
    return f"{1000 * secs:.3g} ms" if secs < 1 else f"{secs:.3g} s" if secs < 100 else duration(secs)


# --- steps that were done again ---


def _again(facts: RunFacts) -> Iterator[Markup]:
    told = facts.told
    if not told.verdicts:
        yield element("p", "No resumed run has compared steps with those of the run before.")
        return
    counts = listed(f"{count:,} {outcome}" for outcome, count in told.outcomes.most_common())
    yield element("p", f"Resumed runs compared with the runs before them: {counts}.")
    rows = [
        (
            _when(one["time"]),
            str(one.get("role")),
            coloured(str(one.get("outcome")), _OUTCOMES.get(str(one.get("outcome")), "plain")),
            str(one.get("message")),
        )
        for one in reversed(told.verdicts)
    ]
    yield table(("When", "Process", "Verdict", "What was found"), rows)
    yield from _not_shown(told.outcomes.total() - len(rows), "earlier verdicts")


# --- configuration ---


def _configuration(facts: RunFacts) -> Iterator[Markup]:
    start = facts.told.start
    argv = start.get("argv")
    told = {
        "command": element("code", " ".join(argv)) if isinstance(argv, list) else "",
        "host": start.get("host"),
        "framework": " ".join(str(start[name]) for name in ("engine", "framework_version") if start.get(name)),
        "Python": start.get("python"),
        "Stepguard": start.get("version"),
        "launcher": _launcher(facts),
    }
    rows = [(name, value) for name, value in told.items() if value]
    yield element("h3", "Of the newest start")
    yield table(("What", "Value"), rows) if rows else element("p", "The ledger has no start.")
    yield from _options(facts)
    if facts.hyperparameters:
        yield element("h3", "Hyperparameters, as last recorded")
        found = sorted(facts.hyperparameters.items())[:_MOST_ROWS]
        yield table(("Name", "Value"), [(name, f"{value:.6g}") for name, value in found], numbers=(1,))


def _options(facts: RunFacts) -> Iterator[Markup]:
    told = [(number, one.options) for number, one in enumerate(facts.history.attempts, 1) if one.options is not None]
    if not told:
        return
    changed: dict[str, list[str]] = {}
    for (_, before), (number, after) in itertools.pairwise(told):
        for one in configuration.changes(before, after):
            changed.setdefault(one.name, []).insert(0, f"at start {number:,}, before: {one.before}")
    newest = told[-1][1]
    rows = [
        (
            name,
            coloured(configuration.shown(newest, name), "trouble" if name in changed else "plain"),
            listed(changed.get(name, ()), most=3, separator="; "),
        )
        for name in sorted({**newest, **changed})
    ]
    yield element("h3", "Options that are not the defaults")
    if rows:
        yield table(("Option", "Value", "Changed"), rows[:_MOST_ROWS])
    else:
        yield element("p", "All have been the defaults.")


def _launcher(facts: RunFacts) -> str:
    found = facts.state.launcher
    if found is None:
        return ""
    return f"stepguard run, process {found.pid} on {found.host}: {found.state}" + (
        f", {found.reason}: {found.failure}" if found.state == "gave up" else ""
    )


def _foot(facts: RunFacts) -> Markup:
    zone = time.strftime("%Z (UTC%z)", time.localtime(facts.state.now))
    return element(
        "footer",
        f"Written by stepguard report {__version__} at ",
        _when(facts.state.now),
        f". Times are of the zone {zone}, by the clocks of the machines that have written them. This file is whole: it "
        f"fetches nothing. In a chart, drag to look closer, and double-click to return.",
    )


def _when(moment: float) -> Markup:
    day, clock = charts.date(moment)[:19].split("T")
    return joined((element("time", day), " ", element("time", clock)))
