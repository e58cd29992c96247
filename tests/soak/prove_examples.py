"""Every example that trains is proven by `stepguard prove`, as a user would: a table, and exit code 1 if one is not.

python tests/soak/prove_examples.py
python tests/soak/prove_examples.py digits.py --steps 1000 --seed 7
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

# The example, what starts it, and its arguments.
PROGRAMS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("single_program.py", (), ()),
    ("manual_summaries.py", (), ()),
    ("extra_service.py", (), ()),
    ("custom_init_fn.py", (), ()),
    ("custom_local_init_op.py", (), ()),
    ("jax/digits.py", (), ()),
    ("jax/digits_equinox.py", (), ()),
    ("jax/characters.py", (), ()),
    (
        "../tests/jax/jax_distributed.py",
        (str(ROOT / "tests" / "jax" / "jax_launch.py"),),
        ("--logdir=runs/jax_distributed", "--steps=60", "--save-secs=0.5", "--step-secs=0.05"),
    ),
    ("torch/digits.py", (), ()),
    ("torch/digits_ddp.py", TORCHRUN, ()),
    ("torch/digits_accelerate.py", (), ()),
    ("torch/images.py", TORCHRUN, ("--width=4",)),
    ("torch/language_model.py", (), ("--batch-size=64", "--context=32", "--width=16", "--dtype=float32")),
    ("torch/characters.py", (), ()),
)


def prove(program: tuple[str, tuple[str, ...], tuple[str, ...]], options: list[str], folder: Path) -> dict[str, object]:
    """The document of the verdict."""
    name, launcher, arguments = program
    command = [sys.executable, "-m", "stepguard", "prove", "--json", *options, "--"]
    command += [sys.executable, *launcher, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    try:
        return dict(json.loads(ended.stdout))
    except ValueError:
        return {"verdict": "failed", "reason": ended.stderr[-2000:]}


def main() -> None:
    """Prove them all, or those that are named; ends with 1 if one is not proven."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", help="parts of the names of examples; by default all")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--faults")
    given = options.parse_args()
    chosen = [one for one in PROGRAMS if not given.names or any(name in one[0] for name in given.names)]
    passed = [f"--steps={given.steps}", f"--seed={given.seed}", *([f"--faults={given.faults}"] if given.faults else [])]
    failed = 0
    for program in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = prove(program, passed, Path(folder))
        failed += found["verdict"] != "proven"
        print(
            f"{program[0].removeprefix('../'):<32}{found['verdict']:<18}{time.monotonic() - began:6.0f} s", flush=True
        )
        if found["verdict"] != "proven":
            print(json.dumps(found, indent=2)[:4000], flush=True)
    print(f"{len(chosen)} programs, {failed} not proven")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
