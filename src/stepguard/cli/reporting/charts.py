"""The charts of a report, drawn by Plotly, which is loaded here alone.

Plotly takes some texts for markup of its own (``<b>``, ``<a href=...>``): every text that comes from a file goes
through `shown_text`. Charts are transparent, and have no colours but those of their curves: the page gives the
others, in its light and in its dark form.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from stepguard.cli import interrupts
from stepguard.cli.exits import NOT_DONE, CommandError
from stepguard.cli.logdir.event_files import Curve
from stepguard.cli.reporting.gathering import CheckpointRow, RunFacts
from stepguard.cli.reporting.thinning import shown_of
from stepguard.cli.text import output
from stepguard.watching.history import Attempt
from stepguard.words import duration, printable

BLUE, RED, AMBER, GREEN, GREY, VIOLET = "#3b82c4", "#d9534f", "#d98a1f", "#2f9e6e", "#8a94a3", "#9a72d6"
"""Colours that are readable on white and on a dark ground."""

_MOST_ATTEMPTS = 500
_MOST_RESTARTS = 60
_POINTS_OF_A_CURVE = 1500
_LONGEST_TEXT = 300
_LATEST = 253_370_764_800.0  # the last year that a date can have

_Figure = dict[str, Any]
_OF_TIME: Mapping[str, Any] = {"type": "date", "tickangle": 0, "nticks": 5}


def load() -> Any:
    """The modules of Plotly. Raises CommandError if it is not installed."""
    try:
        with interrupts.held():
            import plotly.graph_objects
            import plotly.offline
    except ImportError as error:
        raise CommandError(
            f"a report cannot be drawn without plotly ({error}): pip install 'stepguard[report]'", NOT_DONE
        ) from error
    return plotly


def script(plotly: Any) -> str:
    """Plotly's own script, which a page with charts needs."""
    return str(plotly.offline.get_plotlyjs())


def as_json(plotly: Any, figure: _Figure) -> str:
    """A chart as JSON that may stand in a page. Raises ValueError if Plotly knows no such chart."""
    found = plotly.graph_objects.Figure(data=figure["data"], layout={"template": "none", **figure["layout"]})
    # Parsed once more: numbers that JSON does not have are null, and no text ends the element that it stands in.
    document = {name: part for name, part in json.loads(found.to_json()).items() if name in ("data", "layout")}
    return json.dumps(document, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shown_text(text: str) -> str:
    """A text from a file, on one line, not too long, and without a meaning to Plotly."""
    text = printable(text)
    return html.escape(text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…", quote=False)


def date(time: float) -> str:
    """A Unix time as Plotly's axes take it, in the time zone of this machine."""
    return datetime.fromtimestamp(min(max(0.0, time), _LATEST)).isoformat(timespec="milliseconds")  # noqa: DTZ006


# --- the timeline: at which step the run was when ---


def timeline(facts: RunFacts) -> _Figure:
    """The step of the run over time: each start a line, what is lost a fall, with checkpoints, ends and hangs."""
    attempts = [one for one in facts.history.attempts if one.first_step is not None][-_MOST_ATTEMPTS:]
    data = [
        *_gaps(attempts),
        _line(attempts, facts),
        *_checkpoints(facts.checkpoints),
        _marks(
            "a hang, or a return of the NaN guard",
            [(one.time, one.step, one.text) for one in facts.told.marks],
            AMBER,
            "triangle-up",
        ),
        *_ends(facts),
    ]
    layout = _layout(height=430, legend=True)
    layout["xaxis"] = {**layout["xaxis"], **_OF_TIME}
    layout["yaxis"] = {**layout["yaxis"], "title": {"text": "step"}, "rangemode": "tozero"}
    return {"data": [one for one in data if one["x"]], "layout": layout}


def _line(attempts: Sequence[Attempt], facts: RunFacts) -> _Figure:
    points = iter([*facts.told.points.items(), None])
    xs: list[str | None] = []
    ys: list[int | None] = []
    point = next(points)
    for one in attempts:
        inside = [(one.started, one.first_step)]
        while point is not None and point.time <= one.ended:
            if point.time >= one.started:
                inside.append((point.time, point.step))
            point = next(points)
        inside.append((one.ended, one.last_step))
        xs += [*(date(time) for time, _ in inside), None]
        ys += [*(step for _, step in inside), None]
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "training",
        "x": xs,
        "y": ys,
        "line": {"color": BLUE, "width": 2},
    }
    return {**line, "hovertemplate": "step %{y}<br>%{x}<extra></extra>"}


def _gaps(attempts: Sequence[Attempt]) -> list[_Figure]:
    """The way from the end of an attempt to the beginning of the next: steps that are lost, or only time."""
    gaps: dict[bool, tuple[list[str | None], list[int | None]]] = {True: ([], []), False: ([], [])}
    for before, after in itertools.pairwise(attempts):
        xs, ys = gaps[(before.last_step or 0) > (after.first_step or 0)]
        xs += [date(before.ended), date(after.started), None]
        ys += [before.last_step, after.first_step, None]
    line = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    return [
        {**line, "name": name, "x": gaps[is_lost][0], "y": gaps[is_lost][1], "line": {"color": colour, "dash": "dot"}}
        for is_lost, name, colour in ((True, "down, and steps lost", RED), (False, "down", GREY))
    ]


def _checkpoints(rows: Sequence[CheckpointRow]) -> list[_Figure]:
    groups: dict[str, list[CheckpointRow]] = {}
    for one in rows:
        if one.step is not None:
            group = "best" if one.is_best else "kept" if one.kept else one.state
            groups.setdefault(group, []).append(one)
    kinds = {
        "good": ("good checkpoint", GREEN, "circle"),
        "best": ("best checkpoint", VIOLET, "star"),
        "kept": ("kept checkpoint", GREEN, "square"),
        "damaged": ("damaged checkpoint", RED, "diamond"),
        "mirrored": ("checkpoint only in the mirror", BLUE, "circle-open"),
    }
    others = [one for name, group in groups.items() if name not in kinds for one in group]
    found = [_marks(label, _texts(groups.get(name, ())), colour, sign) for name, (label, colour, sign) in kinds.items()]
    return [*found, _marks("checkpoint without a commit", _texts(others), AMBER, "diamond-open")]


def _texts(rows: Iterable[CheckpointRow]) -> list[tuple[float, int, str]]:
    return [
        (one.time, one.step or 0, f"{one.name}, {one.state}, {output.size(one.bytes)}{', ' * bool(one.kept)}{one.kept}")
        for one in rows
    ]


def _ends(facts: RunFacts) -> list[_Figure]:
    ends: dict[str, list[tuple[float, int, str]]] = {"failed": [], "stopped": [], "finished": []}
    step = 0
    attempts = facts.history.attempts
    for number, one in enumerate(attempts):
        step = step if one.last_step is None else one.last_step
        if one.reason is None and number == len(attempts) - 1 and facts.is_running:
            continue
        kind = "failed" if one.reason in (None, "error") else "finished" if one.reason == "finished" else "stopped"
        ends[kind].append((one.ended, step, f"start {number + 1}: {facts.end_of(number)}"))
    return [
        _marks("crashed or failed", ends["failed"][-_MOST_ATTEMPTS:], RED, "x"),
        _marks("stopped", ends["stopped"][-_MOST_ATTEMPTS:], GREY, "square"),
        _marks("finished", ends["finished"][-_MOST_ATTEMPTS:], BLUE, "hexagram"),
    ]


def _marks(name: str, points: Sequence[tuple[float, int, str]], colour: str, symbol: str) -> _Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [date(time) for time, _, _ in points],
        "y": [step for _, step, _ in points],
        "text": [shown_text(text) for _, _, text in points],
        "marker": {"color": colour, "symbol": symbol, "size": 10},
        "hovertemplate": "%{text}<br>step %{y}<br>%{x}<extra></extra>",
    }


# --- the numbers of the program ---


def curve(one: Curve, restarts: Sequence[int]) -> _Figure:
    """The values of one tag over the steps, with dotted lines where a start has gone on."""
    shown = shown_of(one.values, _POINTS_OF_A_CURVE)
    line = {
        "type": "scatter",
        "mode": "lines+markers" if len(shown) < 40 else "lines",
        "name": shown_text(one.tag),
        "x": [one.steps[index] for index in shown],
        "y": [one.values[index] if math.isfinite(one.values[index]) else None for index in shown],
        "line": {"color": BLUE, "width": 1.6},
        "marker": {"size": 5},
        "hovertemplate": "step %{x}<br>%{y}<extra></extra>",
    }
    layout = _layout(height=250, legend=False)
    layout["xaxis"] = {**layout["xaxis"], "title": {"text": "step"}}
    layout["shapes"] = [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "line": {**_RESTART}}
        for step in restarts[-_MOST_RESTARTS:]
    ]
    return {"data": [line], "layout": layout}


_RESTART: Mapping[str, Any] = {"color": RED, "width": 1, "dash": "dot"}


# --- costs ---


def time_spent(facts: RunFacts) -> _Figure:
    """One bar: the time of the run, by what it was spent for."""
    found = facts.history
    stalls = min(facts.told.costs.stall_secs, found.productive_secs)
    parts = (
        ("training", found.productive_secs - stalls, GREEN),
        ("waiting for snapshots", stalls, VIOLET),
        ("steps done again", found.replayed_secs, AMBER),
        ("down", found.down_secs, RED),
    )
    whole = sum(secs for _, secs, _ in parts) or 1.0
    layout = _layout(height=150, legend=True)
    layout.update(barmode="stack", bargap=0.3)
    layout["xaxis"] = {**layout["xaxis"], "ticksuffix": " %", "range": [0, 100], "dtick": 20}
    layout["yaxis"] = {"visible": False}
    layout["margin"]["r"] = 28  # Room for the half of "100 %" that is beside the bar, else Plotly leaves it out.
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "x": [100 * secs / whole],
                "y": [""],
                "text": [f"{name}: {_secs(secs)}, {100 * secs / whole:.3g} %"],
                "textposition": "none",
                "marker": {"color": colour},
                "hovertemplate": "%{text}<extra></extra>",
            }
            for name, secs, colour in parts
        ],
        "layout": layout,
    }


def saves(facts: RunFacts, *, stalls: bool) -> _Figure:
    """For each save the seconds that it took or, with ``stalls``, the milliseconds that training waited."""
    found = facts.told.costs.saves.items()
    values = [1000 * one.stall_secs if stalls else one.secs for one in found]
    layout = _layout(height=250, legend=False)
    layout["xaxis"] = {**layout["xaxis"], **_OF_TIME}
    layout["yaxis"] = {**layout["yaxis"], "rangemode": "tozero", "ticksuffix": " ms" if stalls else " s"}
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "saves",
        "x": [date(one.time) for one in found],
        "y": values,
        "text": [f"step {'unknown' if one.step is None else one.step}, {output.size(one.bytes)}" for one in found],
        "marker": {"color": VIOLET if stalls else BLUE, "size": 5},
        "hovertemplate": "%{text}<br>%{y}<br>%{x}<extra></extra>",
    }
    return {"data": [points], "layout": layout}


def _secs(secs: float) -> str:
    return f"{secs:.3g} s" if secs < 100 else duration(secs)


def _layout(*, height: int, legend: bool) -> _Figure:
    return {
        "height": height,
        "margin": {"l": 12, "r": 12, "t": 12, "b": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "hovermode": "closest",
        "showlegend": legend,
        "legend": {"orientation": "h", "yanchor": "top", "y": -0.2, "xanchor": "left", "x": 0, "traceorder": "normal"},
        "xaxis": {"automargin": True, "zeroline": False},
        "yaxis": {"automargin": True, "zeroline": False},
    }
