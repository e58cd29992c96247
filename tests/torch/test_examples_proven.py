"""Examples are proven: killed and damaged, they are bit by bit the same run. `tests/soak/prove_examples.py` has all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import fork
from proving import main

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "torch"
README = Path(__file__).parent.parent.parent / "README.md"


def prove(argv, place, *, steps=40, faults=("kill", "damage")):
    """The document of the verdict."""
    process = fork(main, [str(one) for one in argv], steps, faults, str(place))
    process.join(200)
    output = (place / "output").read_text()
    assert process.exitcode == 0, output
    found = json.loads((place / "verdict.json").read_text())
    return found, output


def test_an_example_is_proven(tmp_path):
    found, output = prove([EXAMPLES / "digits.py"], tmp_path)

    assert found["verdict"] == "proven", (found, output)
    assert [one["kind"] for one in found["runs"]] == ["undisturbed", "again", "kill", "damage"]
    assert max(one["batches_compared"] or 0 for one in found["runs"]) == 40 - found["begins_at"]
    assert sum(len(one["restarts"]) for one in found["runs"]) >= 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.soak
def test_the_program_of_the_readme_is_proven_although_it_seeds_nothing(tmp_path):
    blocks = [block.split("```")[0] for block in README.read_text().split("```python\n")[1:]]
    (program,) = [block for block in blocks if "from stepguard.torch import Supervisor" in block]
    (tmp_path / "first.py").write_text(program)

    found, output = prove([tmp_path / "first.py"], tmp_path, faults=("kill",))

    assert found["verdict"] == "proven", (found, output)
    assert found["begins_at"] > 0
