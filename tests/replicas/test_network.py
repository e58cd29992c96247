"""The link between a parameter server and its workers is cut without a word, and mended."""

from __future__ import annotations

import time

import pytest
from cluster import Link

from stepguard.options import Watching

pytestmark = pytest.mark.skipif(not Link.is_possible(), reason="network namespaces need root and iproute2")


def test_a_cut_link_is_noticed_within_the_bound_and_nothing_is_rolled_back(make_cluster):
    with Link() as link:
        cluster = make_cluster(link=link)
        cluster.serve()
        bound = {"watching": Watching(peer_timeout_secs=4)}
        for index in range(2):
            cluster.train(index, supervisor=bound)
        for task in cluster.workers:
            task.wait_for_step(50)
        link.cut()
        cut = time.time()
        for task in cluster.workers:
            lost = task.wait_for("lost")
            assert lost["type"] == "UnavailableError"
            # Without the bound: for as long as TCP tries, which is a quarter of an hour.
            assert lost["time"] - cut < 60
        steps = max(task.step for task in cluster.workers)
        link.mend()
        mended = time.time()
        for task in cluster.workers:
            assert task.wait_for("session", after=mended)["step"] >= steps
            task.wait_for_step(steps + 20)


def test_a_short_cut_costs_nothing(make_cluster):
    with Link() as link:
        cluster = make_cluster(link=link)
        cluster.serve()
        for index in range(2):
            cluster.train(index, supervisor={"watching": Watching(peer_timeout_secs=20)})
        cluster.chief.wait_for_step(50)
        link.cut()
        cluster.chief.process.join(2)
        link.mend()
        cluster.chief.wait_for_step(cluster.chief.step + 50)
        assert not any(task.reports("lost") for task in cluster.workers)
