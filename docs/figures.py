"""Draw the figures of the documentation into ``docs/images``, and fill in the tables of ``docs/benchmarks.md``.

Bars and tables are those of ``docs/images/benchmarks.json``, which ``python benchmarks/run.py --json FILE`` writes.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).resolve().parent / "images"
PAGE = IMAGES.parent / "benchmarks.md"
MEASURED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
# Figures have a ground of their own, so that they can be read on light and on dark pages.
INK, PALE, LINE, GOOD, BAD, GROUND = "#24292f", "#57606a", "#8c959f", "#2da44e", "#cf222e", "#ffffff"
FONT = 'font-family="system-ui, DejaVu Sans, sans-serif"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, help="default: docs/images")
    args = parser.parse_args()
    for name, drawing in figures().items():
        (args.out / name).write_text(drawing)
    PAGE.write_text(filled_in(PAGE.read_text()))


def measurements() -> dict:
    return json.loads((IMAGES / "benchmarks.json").read_text())


def filled_in(page: str) -> str:
    """The page of the benchmarks, with what they have printed after each ``<!-- measured: NAME -->``."""
    measured = measurements()

    def printed(found: re.Match[str]) -> str:
        if found[2] == "about":
            return f"{found[1]}{measured['about']}.\n{found[3]}"
        one = measured["benchmarks"][found[2]]
        output = one["output"] if one["tables"] else f"```text\n{textwrap.indent(one['output'], '  ')}\n```"
        return f"{found[1]}`{one['command']}`\n\n{output}\n{found[3]}"

    return MEASURED.sub(printed, page)


def figures() -> dict[str, str]:
    """Each figure, by the name of its file."""
    measured = measurements()
    return {"state.svg": state(), "kill.svg": kill(), "benchmarks.svg": bars(measured)}


# --- what figures are made of ---


def text(x: float, y: float, words: str, *, size: int = 14, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, title: str, below: str, *, colour: str = LINE) -> str:
    shape = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="52" rx="6" fill="none" stroke="{colour}" '
        'stroke-width="2"/>'
    )
    middle = x + width / 2
    return "\n".join([shape, text(middle, y + 23, title), text(middle, y + 41, below, size=11, colour=PALE)])


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = LINE) -> str:
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="2" '
        f'marker-end="url(#{"bad" if colour == BAD else "head"})"/>'
    )


def rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}"/>'


def figure(width: int, height: int, title: str, *parts: str) -> str:
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
        for name, colour in (("head", LINE), ("bad", BAD))
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {FONT}>',
            f"<title>{escape(title)}</title>",
            f"<defs>{heads}</defs>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{GROUND}"/>',
            *parts,
            "</svg>\n",
        ]
    )


# --- the figures ---


def state() -> str:
    """The way of the state: from a step boundary to the disk, and back."""
    parts = [text(20, 30, "while it trains", size=13, colour=PALE, anchor="start")]
    way = [
        ("snapshot", "of one step"),
        ("data files", "written, fsynced"),
        ("manifest", "sizes and digests"),
        ("state file, event", "then pruning"),
        ("mirror", "if there is one"),
    ]
    for place, (title, below) in enumerate(way):
        x = 20 + place * 172
        parts.append(box(x, 60, 140, title, below, colour=GOOD if title == "manifest" else LINE))
        if place:
            parts.append(arrow(x - 32, 86, x - 4, 86))
    parts += [
        text(90, 52, "training thread", size=11, colour=PALE),
        text(434, 52, "writer thread", size=11, colour=PALE),
        text(778, 52, "uploader thread", size=11, colour=PALE),
        text(434, 130, "from here on the checkpoint exists", size=12, colour=GOOD),
        text(20, 170, "at a start", size=13, colour=PALE, anchor="start"),
        box(20, 190, 140, "newest of all", "in logdir and mirror"),
        arrow(160, 216, 188, 216),
        box(192, 190, 140, "verify", "every byte"),
        arrow(332, 216, 360, 216),
        box(364, 190, 140, "restore", "model and position"),
        arrow(504, 216, 532, 216),
        box(536, 190, 140, "session", "the next step"),
        arrow(262, 242, 262, 266, BAD),
        box(192, 270, 140, "quarantine/", "kept for a look", colour=BAD),
        f'<path d="M192 296 H90 V246" fill="none" stroke="{BAD}" stroke-width="2" marker-end="url(#bad)"/>',
        text(345, 290, "damaged: a warning says what was lost,", size=12, colour=BAD, anchor="start"),
        text(345, 308, "and the next older one is tried", size=12, colour=BAD, anchor="start"),
    ]
    return figure(880, 340, "The way of the state: to the disk, and back", *parts)


def kill() -> str:
    """What a kill costs: the steps since the newest checkpoint, and none of them is another step than before."""
    left, save, killed, right = 60, 440, 560, 820
    parts = [
        text(left, 36, "the run that is killed", size=13, colour=PALE, anchor="start"),
        f'<line x1="{left}" y1="70" x2="{killed}" y2="70" stroke="{INK}" stroke-width="3"/>',
        f'<line x1="{save}" y1="70" x2="{killed}" y2="70" stroke="{BAD}" stroke-width="3"/>',
        text(killed + 14, 75, "SIGKILL", colour=BAD, anchor="start"),
        text((save + killed) / 2, 56, "at most save_model_secs", size=12, colour=BAD),
        text(left, 146, "the same command again", size=13, colour=PALE, anchor="start"),
        f'<line x1="{save}" y1="180" x2="{killed}" y2="180" stroke="{GOOD}" stroke-width="3"/>',
        f'<line x1="{killed}" y1="180" x2="{right}" y2="180" stroke="{INK}" stroke-width="3"/>',
        arrow(save, 84, save, 168),
        text(save - 10, 130, "restore", size=12, colour=PALE, anchor="end"),
        text((save + killed) / 2, 210, "done again, and compared: the same steps", size=12, colour=GOOD),
        text(right, 210, "new steps", size=12, colour=PALE, anchor="end"),
    ]
    parts += [
        f'<circle cx="{x}" cy="{y}" r="6" fill="{GROUND}" stroke="{INK}" stroke-width="3"/>'
        for x, y in ((120, 70), (280, 70), (save, 70), (660, 180), (780, 180))
    ]
    parts.append(text(120, 100, "checkpoint", size=12, colour=PALE))
    return figure(880, 236, "What a kill costs: the steps since the newest checkpoint", *parts)


def bars(measured: dict) -> str:
    """The longest steps while checkpoints are written, and the checkpoints that mix two steps."""
    table = measured["benchmarks"]["checkpointing"]["tables"][0]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    times = [float(row["99th percentile"]) for row in rows]
    parts = [text(20, 32, "99th percentile of a step that saves 200 MB every second, in ms", size=15, anchor="start")]
    for place, (row, time) in enumerate(zip(rows, times, strict=True)):
        y = 54 + place * 40
        name, torn = row["class"], int(row["torn"])
        width = 450 * time / max(times)
        parts.append(text(210, y + 19, name, size=13, anchor="end"))
        parts.append(rectangle(220, y, width, 28, GOOD if name == "stepguard" else LINE))
        words = f"{time:.0f}"
        if int(row["checkpoints"]):
            words += f", {torn} of {row['checkpoints']} checkpoints torn" if torn else ", no checkpoint torn"
        parts.append(text(228 + width, y + 19, words, size=13, colour=BAD if torn else INK, anchor="start"))
    parts.append(text(20, 54 + len(rows) * 40 + 16, measured["about"], size=11, colour=PALE, anchor="start"))
    return figure(880, 54 + len(rows) * 40 + 32, "Steps while checkpoints are written", *parts)


if __name__ == "__main__":
    main()
