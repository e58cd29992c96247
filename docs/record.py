"""Record a terminal: the README's first program is killed, resumes, and is proven to be the same run.

The commands really run, in a scratch folder; their output becomes ``docs/images/recording.svg``, whose lines appear as
they came, with shorter waits. ``python docs/record.py`` records anew, in about a minute.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from rich.console import Console
from rich.text import Text

from stepguard.watching import heartbeat

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 86
# PyTorch's event files import TensorFlow where it is installed.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
# A wait in the recording is no longer than this.
LONGEST_WAIT_SECS = 0.9
_STYLES = {
    r"^\$ .*": "bold",
    r"^Killed ": "bold red",
    r"# by .*": "dim",
    r"the run before had come .*": "yellow",
    r"same run, bit for bit": "green",
    r"^PROVEN .*": "bold green",
}
# Rich's own template loads a font from elsewhere.
_TEMPLATE = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
@keyframes appear {{ from {{ opacity: 0 }} to {{ opacity: 1 }} }}
.{unique_id}-matrix text {{ animation: appear 10ms both }}
@media (prefers-reduced-motion: reduce) {{ .{unique_id}-matrix text {{ animation: none }} }}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class Recording:
    """The lines of a terminal, each with the second at which it came."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.lines: list[tuple[float, str]] = []

    def add(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append((time.monotonic() - self._started, line))

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for _, line in self.lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "docs" / "images" / "recording.svg"
    parser.add_argument("--out", type=Path, default=default, help="default: docs/images/recording.svg")
    parser.add_argument("--faults", default="kill,damage", help="for stepguard prove; default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recording = record(Path(folder), args.faults)
    args.out.write_text(drawn(recording))


def record(folder: Path, faults: str) -> Recording:
    """Run it all in ``folder``."""
    program = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert program is not None
    (folder / "first.py").write_text(program[1])
    (folder / "runs" / "prove").mkdir(parents=True)
    recording = Recording()
    recording.add("$ python first.py")
    with start(folder, "first.py") as process:
        for line in lines_of(process):
            recording.add(line)
            if line.startswith("at step"):
                wait_for_work_to_lose(folder / "runs" / "first", process)
                process.kill()
    recording.add("Killed    # by kill -9, from another terminal")
    run(recording, folder, "python first.py", "first.py")
    prove = ["stepguard", "prove", "--faults", faults, "--scratch", "runs/prove", "--", "python", "first.py"]
    run(recording, folder, " ".join(prove), "-m", *prove)
    return recording


def wait_for_work_to_lose(logdir: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a heartbeat with a step after the newest checkpoint: the next start then says what the kill has cost."""
    while process.poll() is None:
        now = heartbeat.read_one(logdir, "chief")
        # A checkpoint exists when its manifest does.
        newest = max((int(path.name[11:].split(".")[0]) for path in logdir.glob("*.manifest.json")), default=0)
        if now is not None and now.step is not None and now.step > newest + 100 and newest > 0:
            return
        time.sleep(0.01)
    sys.exit("the program ended before it could be killed")


def run(recording: Recording, folder: Path, shown: str, *arguments: str) -> None:
    recording.add(f"$ {shown}")
    with start(folder, *arguments) as process:
        for line in lines_of(process):
            recording.add(line)
    if process.returncode != 0:
        sys.exit(f"{shown} ended with {process.returncode}")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    # The programs that are started here are those of this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-u", *arguments],
        cwd=folder,
        env={**os.environ, **QUIET, "PATH": path, "COLUMNS": str(WIDTH)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        # A slow disk of the machine that records is no part of the story.
        if not line.startswith("a checkpoint was due while the last one was still being written"):
            yield line.rstrip().removeprefix("stepguard: ")


def drawn(recording: Recording) -> str:
    """The picture, with the text of the terminal in its description."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", highlight=False)
    delays, now, last = [], 0.0, 0.0
    for at, line in recording.lines:
        now += min(at - last, LONGEST_WAIT_SECS)
        last = at
        text = Text(line)
        for pattern, style in _STYLES.items():
            text.highlight_regex(pattern, style)
        delays.extend([now] * len(text.wrap(console, WIDTH)))
        console.print(text)
    title = "python first.py"
    svg = console.export_svg(title=title, code_format=_TEMPLATE, unique_id="recording")
    svg = re.sub(
        r"<text (class=\"recording-r\d+\" [^>]*url\(#recording-line-(\d+)\))",
        lambda found: f'<text style="animation-delay: {delays[int(found[2])]:.2f}s" {found[1]}',
        svg,
    )
    svg = "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"
    about = f"<title>A training is killed, resumes, and is proven</title>\n<desc>\n{escape(recording.text)}</desc>\n"
    return svg.replace("<style>", f"{about}<style>", 1)


if __name__ == "__main__":
    main()
