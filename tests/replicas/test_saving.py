"""Checkpoints of a model on parameter servers go through the same commit as any other."""

from __future__ import annotations

import json
import time

import pytest
import tensorflow as tf
from cluster import restored_step


def manifest(cluster, step):
    return json.loads((cluster.logdir / f"model.ckpt-{step}.manifest.json").read_text())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_over_two_servers_is_committed_and_restored(make_cluster, sharded):
    cluster = make_cluster(ps=2)
    for index in range(2):
        cluster.serve(index)
    chief = cluster.train(0, parts=4, sharded=sharded, supervisor={"save_model_secs": 0.5})
    worker = cluster.train(1, parts=4)
    worker.wait_for_step(150)
    cluster.wait_for_saved()
    for server in cluster.ps:
        server.kill()
    killed = time.time()
    chief.wait_for("lost")
    committed = cluster.saved_steps()[-1]
    names = {one["name"] for one in manifest(cluster, committed)["files"]}
    shards = 2 if sharded else 1
    assert {name for name in names if ".data-" in name} == {
        f"model.ckpt-{committed}.data-{shard:05d}-of-{shards:05d}" for shard in range(shards)
    }
    reader = tf.train.load_checkpoint(str(cluster.logdir / f"model.ckpt-{committed}"))
    assert set(reader.get_variable_to_shape_map()) == {"global_step", "w0", "w1", "w2", "w3"}
    for server in cluster.ps:
        server.restart()
    assert chief.wait_for("session", after=killed)["step"] >= committed
    worker.wait_for("session", after=killed)


def test_one_of_two_servers_dies_and_both_go_back_to_the_same_step(make_cluster):
    cluster = make_cluster(ps=2)
    for index in range(2):
        cluster.serve(index)
    chief = cluster.train(0, parts=4, supervisor={"save_model_secs": 0.5})
    cluster.train(1, parts=4).wait_for_step(100)
    cluster.wait_for_saved()
    cluster.ps[1].kill()
    killed = time.time()
    chief.wait_for("lost")
    committed = cluster.saved_steps()[-1]
    cluster.ps[1].restart()
    assert chief.wait_for("session", after=killed)["step"] >= restored_step(cluster) == committed


@pytest.mark.parametrize("sharded", [False, True])
def test_retention_removes_files_and_manifests_alike(make_cluster, sharded):
    cluster = make_cluster(ps=2)
    for index in range(2):
        cluster.serve(index)
    chief = cluster.train(0, parts=2, sharded=sharded, supervisor={"save_model_secs": 0.2})
    chief.wait_for("session")

    def steps(pattern):
        return sorted(int(path.name.split("-")[1].split(".")[0]) for path in cluster.logdir.glob(pattern))

    chief.wait_for_step(400)
    # More than are kept, so that some were removed.
    cluster.wait_for_saved(5, after=cluster.wait_for_saved()[-1])
    chief.kill()
    newest = steps("model.ckpt-*.manifest.json")[-1]
    assert 1 <= len(steps("model.ckpt-*.manifest.json")) <= 6
    chief.restart()
    chief.wait_for_step(newest + 50)
    assert "quarantine" not in chief.output
    # A saver of the program's own has removed the files a moment before the manifest goes.
    assert len(set(steps("model.ckpt-*.manifest.json")) - set(steps("model.ckpt-*.index"))) <= 1


@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_newest_checkpoint_costs_one_step_back(make_cluster, sharded):
    cluster = make_cluster(ps=2)
    for index in range(2):
        cluster.serve(index)
    chief = cluster.train(0, parts=2, sharded=sharded, supervisor={"save_model_secs": 0.3})
    chief.wait_for_step(300)
    cluster.wait_for_saved(2)
    for task in (*cluster.ps, chief):
        task.kill()
    *_, older, newest = cluster.saved_steps()
    data = cluster.logdir / f"model.ckpt-{newest}.data-00000-of-0000{1 + sharded}"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    for task in (*cluster.ps, chief):
        task.restart()
    assert chief.wait_for("session")["step"] == older
    assert (cluster.logdir / "quarantine" / f"model.ckpt-{newest}").is_dir()
