"""What a newcomer does, in environments that have nothing else: each extra alone, by the wheel, on each Python.

python tests/soak/fresh_environments.py
python tests/soak/fresh_environments.py --python python3.12 --extra torch report
python tests/soak/fresh_environments.py --lowest

The wheel is built once. Each environment gets it with one extra, runs the first program of its engine's start page,
kills it with SIGKILL when a checkpoint is there, and starts it again: it has to go on from a checkpoint. Then come the
commands, and what the extra is for. An extra without an engine does that with the fake engine, which is in the wheel.
With --lowest, every package that the wheel asks for has its lowest version. An environment takes up to 6 GB, and is
removed after its use; packages come from the index that pip is set up for. Prints a line for each environment, and ends
with exit code 1 if one has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALL_SECS = 1800
SOON_SECS = 300
PYTHONS = tuple(f"python3.{minor}" for minor in range(10, 15))
# For those who work on Stepguard itself.
NOT_FOR_USERS = {"bench", "dev", "docs"}
# What the frameworks themselves do not support.
NOT_THERE = {("jax", "3.10")}
LOGDIR = Path("runs/first")

FAKE = """\
import time
from pathlib import Path
from stepguard import Mirror, Watching
from stepguard.testing import FakeSupervisor

{before}
sv = FakeSupervisor("runs/first", save_model_secs=0.5, {options})
with sv.managed_session() as sess:
    print("at step", sess.step)
    while sess.step < 2000:
        sess.run_step()
        time.sleep(0.002)
"""
WITH_CURVE = """\
from stepguard.steps.event_file import EventFile

Path("runs/first").mkdir(parents=True, exist_ok=True)
events = EventFile("runs/first")
for step in range(100):
    events.scalar("loss", 1 / (1 + step), step)
events.close()
"""
MIRROR = "s3://bucket/runs/first"


class FreshEnvironmentError(Exception):
    """Something did not go as a newcomer expects. ``is_not_there``: a package has no version for this Python."""

    is_not_there = False


@dataclass(frozen=True)
class Environment:
    """An environment with the wheel in it, and a working directory."""

    python: Path
    folder: Path
    variables: dict[str, str]

    def run(self, *command: str | Path, code: int = 0, secs: float = SOON_SECS) -> str:
        """Run a command to its end, and return what it says."""
        ended = subprocess.run(
            [*map(str, command)],
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=secs,
            check=False,
        )
        if ended.returncode != code:
            shown = " ".join(map(str, command))
            raise FreshEnvironmentError(
                f"{shown}: expected exit code {code}, found {ended.returncode}\n{ended.stdout[-3000:]}"
            )
        return ended.stdout

    def stepguard(self, *arguments: str | Path, code: int = 0) -> str:
        """Run the command that the wheel brings."""
        return self.run(self.python.with_name("stepguard"), *arguments, code=code)

    def begins_at(self) -> int:
        """Run the program to its end, and return the step at which it says to begin."""
        said = self.run(self.python, "first.py")
        found = re.search(r"^at step (\d+)$", said, re.MULTILINE)
        if found is None:
            raise FreshEnvironmentError(f"first.py: expected 'at step N', found\n{said[-3000:]}")
        return int(found[1])

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        names = [one.name for one in (self.folder / LOGDIR).glob("model.ckpt-*.manifest.json")]
        return max((int(re.sub(r"\D", "", name)) for name in names), default=0)

    def kill(self, while_it_runs: Callable[[Environment], None]) -> None:
        """Start the program, and kill it once a checkpoint of a later step than the first is there."""
        log = self.folder / "first.log"
        with log.open("w") as said:
            process = subprocess.Popen(
                [str(self.python), "first.py"], cwd=self.folder, env=self.variables, stdout=said, stderr=said
            )
            deadline = time.monotonic() + SOON_SECS
            try:
                while not self.saved() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                if process.poll() is None:
                    while_it_runs(self)
            finally:
                process.kill()
        if process.wait() != -signal.SIGKILL or not self.saved():
            raise FreshEnvironmentError(
                f"first.py: expected to kill it after its first checkpoint\n{log.read_text()[-3000:]}"
            )


# --- what the extras are for ---


def nothing(env: Environment) -> None:
    """What an extra needs of a program that runs, if it needs nothing."""


def reads_values(env: Environment) -> None:
    expects(env.stepguard("show", LOGDIR), "step")
    env.stepguard("export", LOGDIR, "weights.npz", "--weights")
    env.stepguard("diff", LOGDIR, LOGDIR)
    expects(env.stepguard("events", LOGDIR), "TAG")


def names_what_is_missing(env: Environment) -> None:
    said = env.stepguard("report", LOGDIR, "-o", "report.html", code=3)
    expects(said, "pip install 'stepguard[report]'")


def tables_curves(env: Environment) -> None:
    expects(env.stepguard("events", LOGDIR), "loss")


def draws_curves(env: Environment) -> None:
    env.stepguard("events", LOGDIR, "--png", "curves.png")
    expects((env.folder / "curves.png").read_bytes()[:4].decode("latin-1"), "PNG")


def writes_a_page(env: Environment) -> None:
    env.stepguard("report", LOGDIR, "-o", "report.html")
    expects((env.folder / "report.html").read_text(), ">loss<")


def serves_metrics(env: Environment) -> None:
    address = json.loads((env.folder / LOGDIR / "heartbeats" / "chief.json").read_text())["metrics_url"]
    with urllib.request.urlopen(address, timeout=SOON_SECS) as answer:
        expects(answer.read().decode(), "stepguard_step")


def comes_back_from_the_mirror(env: Environment) -> None:
    expects(env.stepguard("ls", MIRROR), "model.ckpt-2000")
    shutil.rmtree(env.folder / LOGDIR)
    if (step := env.begins_at()) != 2000:
        raise FreshEnvironmentError(f"without its logdir: expected to begin at step 2000, found {step}")


def expects(text: str, part: str) -> None:
    if part not in text:
        raise FreshEnvironmentError(f"expected {part!r} in\n{text[-3000:]}")


@dataclass(frozen=True)
class Use:
    """What an extra is for: a program, what is installed beside, and what is looked at meanwhile and afterwards."""

    program: str
    then: Callable[[Environment], None]
    beside: tuple[str, ...] = ()
    meanwhile: Callable[[Environment], None] = nothing


def of_page(name: str) -> str:
    """The first program of a start page."""
    found = re.search(r'```python title="first.py"\n(.*?)```', (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert found is not None, f"docs/{name}: expected a block with the title first.py"
    return found[1]


def fake(options: str = "", before: str = "") -> str:
    return FAKE.format(options=options, before=before)


USES = {
    "": Use(fake(), names_what_is_missing),
    "torch": Use(of_page("start-pytorch.md"), reads_values),
    "jax": Use(of_page("start-jax.md"), reads_values, beside=("optax",)),
    "tensorflow-cpu": Use(of_page("start-tensorflow.md"), reads_values),
    "tensorflow": Use(of_page("start-tensorflow.md"), reads_values),
    "metrics": Use(fake("watching=Watching(metrics_port=0)"), nothing, meanwhile=serves_metrics),
    "events": Use(fake(before=WITH_CURVE), tables_curves),
    "plots": Use(fake(before=WITH_CURVE), draws_curves),
    "report": Use(fake(before=WITH_CURVE), writes_a_page),
    "mirror": Use(fake(f"mirror={MIRROR!r}"), comes_back_from_the_mirror),
}


# --- environments ---


def built(folder: Path) -> Path:
    """The wheel of this checkout."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def lowest(metadata: Message, extra: str) -> list[str]:
    """Constraints that give each package that the wheel asks for its lowest version."""
    asked = [one.replace('"', "'") for one in metadata.get_all("Requires-Dist", ())]
    asked = [one for one in asked if "extra ==" not in one or f"extra == '{extra}'" in one]
    found = [re.match(r"([\w.-]+)(?:\[[^]]*\])?>=([\d.]+)", one) for one in asked]
    return sorted({f"{one[1]}=={one[2]}.*" for one in found if one is not None})


def torch_for_the_cpu() -> list[str]:
    """The build that the Makefile's targets install."""
    found = re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [] if found is None else [found[1]]


@contextlib.contextmanager
def environment(
    python: Path, requirements: list[str], constraints: list[str], more: dict[str, str]
) -> Iterator[Environment]:
    """A fresh environment with ``requirements``, and nothing of the one that this program runs in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with tempfile.TemporaryDirectory(prefix="stepguard-fresh-") as scratch:
        folder = Path(scratch)
        env = Environment(folder / "env" / "bin" / "python", folder, {**kept, **quiet, **more})
        env.run(python, "-m", "venv", folder / "env")
        (folder / "constraints.txt").write_text("\n".join(constraints))
        install = ("-m", "pip", "install", "--quiet", "--constraint", "constraints.txt")
        try:
            # One after the other, as the page has it.
            for one in requirements:
                env.run(env.python, *install, one, secs=INSTALL_SECS)
        except FreshEnvironmentError as error:
            error.is_not_there = "No matching distribution" in str(error)
            raise
        yield env


def tried(python: Path, wheel: Path, extra: str, constraints: list[str], more: dict[str, str]) -> str:
    """Install, kill, resume, and use it; what came of it in a few words."""
    use = USES[extra]
    requirements = [f"{wheel}[{extra}]" if extra else str(wheel), *use.beside]
    with environment(python, requirements, constraints, more) as env:
        (env.folder / "first.py").write_text(use.program)
        env.kill(use.meanwhile)
        saved = env.saved()
        step = env.begins_at()
        if step < saved:
            raise FreshEnvironmentError(f"first.py: expected to resume at step {saved} or later, found {step}")
        expects(env.stepguard("status", LOGDIR), "stopped: finished")
        expects(env.stepguard("log", LOGDIR), "goes on from")
        env.stepguard("verify", LOGDIR)
        use.then(env)
        return f"resumed at step {step:,}"


@contextlib.contextmanager
def object_store(is_needed: bool) -> Iterator[dict[str, str]]:
    """A server with S3's protocol and an empty bucket, as variables of an environment."""
    if not is_needed:
        yield {}
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://127.0.0.1:{1}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    try:
        yield {"AWS_ENDPOINT_URL": address, **keys}
    finally:
        server.stop()


def version_of(python: str | Path) -> str | None:
    """Its version such as 3.12, or ``None`` if it does not run."""
    asked = [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python",
        nargs="+",
        metavar="PATH",
        help=f"interpreters; by default those of {', '.join(PYTHONS)} on the path",
    )
    parser.add_argument("--extra", nargs="+", choices=sorted(USES), help="by default all; '' is the wheel without any")
    parser.add_argument("--lowest", action="store_true", help="the lowest versions that the wheel says to work with")
    args = parser.parse_args()
    pythons = args.python or [found for one in PYTHONS if (found := shutil.which(one))]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        wheel = built(Path(scratch))
        metadata = metadata_of(wheel)
        named = {one.rsplit(" ", 1)[1] for one in metadata.get_all("Classifier", ())}
        for python in pythons:
            version = version_of(python)
            if version is None:
                failed += bool(args.python)
                print(f"{python}: does not run", flush=True)
                continue
            for extra in args.extra or USES:
                began = time.monotonic()
                constraints = lowest(metadata, extra) if args.lowest else torch_for_the_cpu()
                with object_store(extra == "mirror") as more:
                    try:
                        told = tried(Path(python), wheel, extra, constraints, more)
                    except (FreshEnvironmentError, subprocess.TimeoutExpired) as error:
                        is_known = (extra, version) in NOT_THERE or version not in named or args.lowest
                        told = f"FAILED: {error}"
                        if is_known and getattr(error, "is_not_there", False):
                            told = "there is none for this Python"
                        failed += told.startswith("FAILED")
                print(f"{version:<6}{extra or 'no extra':<16}{time.monotonic() - began:5.0f} s  {told}", flush=True)
    sys.exit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
