"""Every task is killed and frozen in its turn: training goes on, and nothing is lost that still lived somewhere.

More rounds, and the same with TensorFlow's own class: ``python tests/replicas/rounds.py --rounds 50``.
"""

from __future__ import annotations

import os

import pytest
from rounds import run

ROUNDS = int(os.environ.get("STEPGUARD_REPLICA_ROUNDS", "9"))


@pytest.mark.timeout(120 + 60 * ROUNDS)
def test_every_round_comes_back_with_nothing_lost_that_lived(tmp_path):
    # On a busy machine it takes many times the seconds that the table of `rounds.py` tells of.
    all_played = run("stepguard", ROUNDS, place=tmp_path / "cluster", seed=ROUNDS, back_within_secs=120.0)
    for number, played in enumerate(all_played):
        assert played.back_secs is not None, f"round {number}: {played}"
        assert played.lost_live == 0, f"round {number}: {played}"
        assert played.behind_commit == 0, f"round {number}: {played}"
