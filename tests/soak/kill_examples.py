"""Kills an example for PyTorch at random moments, as often as one likes: it must end bit by bit as without kills.

    python tests/soak/kill_examples.py language_model.py --kills 50
    python tests/soak/kill_examples.py images.py --kills 20

The signals are SIGKILL, SIGTERM and Ctrl-C. `images.py` runs under torchrun in two processes, one of which is killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "torch"))
from test_examples_killed import Program  # noqa: E402

# Sizes with which a run takes about ten seconds.
ARGUMENTS = {
    "language_model.py": ["--steps=150", "--accumulate=3", "--batch-size=64", "--context=32", "--width=16"],
    "images.py": ["--epochs=30", "--batch-size=64", "--width=4"],
}
LAUNCHER = {
    "language_model.py": [],
    "images.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(name: str, logdir: Path, save_secs: float) -> subprocess.Popen[str]:
    program = ROOT / "examples" / "torch" / name
    command = [sys.executable, *LAUNCHER[name], str(program), f"--logdir={logdir}", *ARGUMENTS[name]]
    hidden = ROOT / "tests" / "torch" / "without_tensorflow"
    paths = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [*command, f"--save-model-secs={save_secs}"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_whole(name: str, logdir: Path) -> float:
    """Run without a kill; the seconds that it took."""
    began = time.monotonic()
    process = start(name, logdir, 3600)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return time.monotonic() - began


def kill_once(name: str, logdir: Path, chance: random.Random, most_secs: float) -> str | None:
    """Run, and send a signal at a random moment; what was sent, or ``None`` if the program came to its end before."""
    ledger = logdir / "run.jsonl"
    before = ledger.stat().st_size if ledger.exists() else 0
    process = start(name, logdir, chance.choice([0.05, 0.5]))
    number = chance.choice(SIGNALS)
    # From the moment at which it has restored its state; most of the time before is for imports.
    while process.poll() is None and (not ledger.exists() or ledger.stat().st_size == before):
        time.sleep(0.05)
    try:
        said = process.communicate(timeout=chance.uniform(0, most_secs))[0]
    except subprocess.TimeoutExpired:
        training = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        # Of several processes one is killed, and not the launcher that starts them.
        chosen = chance.choice(training[1:] or training) if LAUNCHER[name] else training[0]
        chosen.send_signal(number)
        said = process.communicate()[0]
        assert "Mismatch" not in said, said
        return f"{number.name} after step {newest(logdir)}"
    assert process.returncode == 0, said
    return None


def newest(logdir: Path) -> int:
    steps = [int(one.name.split(".")[1].split("-")[1]) for one in logdir.glob("*.manifest.json")]
    return max(steps, default=0)


def different_places(whole: dict[str, Any], killed: dict[str, Any]) -> list[str]:
    # These programs do not seed the streams of Python and NumPy, and draw nothing from them.
    used = [place for place in {*whole, *killed} if "/random/python" not in place and "/random/numpy" not in place]
    return sorted(place for place in used if whole.get(place) != killed.get(place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=sorted(ARGUMENTS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=12)
    args = parser.parse_args()

    chance = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp())
    secs = run_whole(args.program, folder / "whole")
    whole = Program(args.program, folder / "whole").last_state()
    kills, ends = 0, 0
    while kills < args.kills:
        logdir = folder / f"killed-{ends}"
        while kills < args.kills and (sent := kill_once(args.program, logdir, chance, secs / 3)) is not None:
            kills += 1
            print(f"kill {kills}: {sent}", flush=True)
        last = start(args.program, logdir, 3600)
        said = last.communicate()[0]
        assert last.returncode == 0, said
        ends += 1
        found = different_places(whole, Program(args.program, logdir).last_state())
        assert not found, f"{logdir}: not as without kills: {found[:10]}"
        print(f"end {ends}: the same", flush=True)


if __name__ == "__main__":
    main()
