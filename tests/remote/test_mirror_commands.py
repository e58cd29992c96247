"""The commands on addresses, and those that fetch and send a run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import faults
import mirrors
import pytest
from click.testing import CliRunner
from mirrors import names, train

from stepguard.cli.main import cli
from stepguard.remote.lease import Lease


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path_factory, monkeypatch):
    """Apart from those of other tests, which run at the same time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def stepguard(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(one) for one in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    # What was made to look into the mirror is nobody's business.
    assert tempfile.gettempdir() + "/stepguard-" not in result.output
    assert not list(Path(tempfile.gettempdir()).glob("stepguard-*/model.ckpt*"))
    return result.output


def document(*arguments, code=0):
    return json.loads(stepguard(*arguments, "--json", code=code))


@pytest.fixture
def address(network, tmp_path):
    """A mirror with the checkpoints 1 and 2 of the run in ``tmp_path / "run"``."""
    url = "s3://bucket/runs/x"
    for _ in range(2):
        train(tmp_path / "run", url, 1)
    return url


def test_ls_lists_a_mirror(address):
    assert "model.ckpt-2" in stepguard("ls", address)
    found = document("ls", address)
    assert found["logdir"] == address
    assert [(one["name"], one["state"], one["next"]) for one in found["checkpoints"]] == [
        ("model.ckpt-2", "good", True),
        ("model.ckpt-1", "good", False),
    ]
    assert found["checkpoints"][0]["path"] == f"{address}/model.ckpt-2"


def test_ls_sees_what_is_too_short_without_reading_it(address, network):
    mirrors.copies(address).remote.put("model.ckpt-2/state.json", b"?")
    network.requests.clear()

    assert [one["state"] for one in document("ls", address)["checkpoints"]] == ["damaged", "good"]
    assert not any("state.json" in path for verb, path, _ in network.requests if verb == "GET")


def test_verify_reads_a_mirror_to_its_end(address):
    assert "2 good" in stepguard("verify", address)
    place = mirrors.copies(address).remote
    place.put("model.ckpt-2/state.json", b"?" * place.head("model.ckpt-2/state.json").size)

    found = document("verify", address, code=1)["checkpoints"]
    assert [(one["name"], one["state"]) for one in found] == [("model.ckpt-2", "damaged"), ("model.ckpt-1", "good")]
    assert found[0]["damage"][0]["file"] == f"{address}/model.ckpt-2/state.json"
    assert "good" in stepguard("verify", f"{address}/model.ckpt-1")
    stepguard("verify", f"{address}/model.ckpt-2", code=1)


def test_status_tells_the_story_of_a_mirror(address):
    found = document("status", address)

    assert found["logdir"] == address
    assert found["good_checkpoint"]["name"] == "model.ckpt-2"
    assert len(found["attempts"]) == 2


def test_status_and_ls_of_a_logdir_tell_of_its_mirror(address, tmp_path):
    mirrors.files_gone(tmp_path / "run")

    assert f"mirror {address}: has model.ckpt-2" in stepguard("ls", tmp_path / "run")
    found = document("ls", tmp_path / "run")
    assert found["mirror"]["only_there"] == ["model.ckpt-2", "model.ckpt-1"]
    assert f"mirror {address}: has model.ckpt-2" in " ".join(stepguard("status", tmp_path / "run").split())
    assert document("status", tmp_path / "run")["mirror"]["url"] == address


def test_prune_removes_from_a_mirror_and_never_the_newest_good_one(address):
    assert document("prune", address, "--keep-last", 1, "--dry-run")["removed"] == ["model.ckpt-1"]
    assert names(address) == ["model.ckpt-2", "model.ckpt-1"]
    assert "removed  model.ckpt-1" in stepguard("prune", address, "--keep-last", 1)
    assert names(address) == ["model.ckpt-2"]
    assert "2 good" not in stepguard("verify", address)


def test_prune_leaves_a_mirror_alone_into_which_a_run_trains(address, tmp_path):
    lease = Lease(mirrors.copies(address).remote, tmp_path / "other", lease_secs=1, on_lost=lambda _: None)
    lease.acquire()
    try:
        assert "no other chief of this mirror" in stepguard("prune", address, "--keep-last", 1, code=1)
    finally:
        lease.release()
    assert names(address) == ["model.ckpt-2", "model.ckpt-1"]


def test_show_reads_the_checkpoint_of_a_mirror(tmp_path, network):
    import torch

    from stepguard.torch import Supervisor

    url = "s3://bucket/runs/torch"
    model = torch.nn.Linear(3, 1)
    with Supervisor({"model": model}, logdir=tmp_path / "torch", mirror=url).managed_session() as sess:
        for _ in sess.steps(range(2), max_steps=2):
            pass

    assert "model/weight" in stepguard("show", url).replace(".", "/")
    assert f"{url}/model.ckpt-2: step 2, torch, good" in stepguard("show", f"{url}/model.ckpt-2")


class TestPull:
    def test_fetches_the_newest_and_the_history(self, address, tmp_path):
        assert "pulled  model.ckpt-2" in stepguard("pull", address, tmp_path / "here")

        assert [one.name for one in mirrors.CheckpointStore(tmp_path / "here").candidates()] == ["model.ckpt-2"]
        assert (tmp_path / "here/run.jsonl").read_bytes() == (tmp_path / "run/run.jsonl").read_bytes()
        assert train(tmp_path / "here", str(tmp_path / "other"), 0) == 2

    def test_fetches_all_when_asked_and_nothing_twice(self, address, tmp_path):
        assert document("pull", address, tmp_path / "here", "--all")["pulled"] == ["model.ckpt-1", "model.ckpt-2"]
        assert "0 checkpoints pulled" in stepguard("pull", address, tmp_path / "here", "--all")

    def test_goes_on_to_the_next_older_one_when_the_newest_is_damaged(self, address, tmp_path):
        mirrors.copies(address).remote.put("model.ckpt-2/state.json", b"?")

        found = document("pull", address, tmp_path / "here", code=1)
        assert found["pulled"] == ["model.ckpt-1"]
        assert list(found["damaged"]) == ["model.ckpt-2"]


class TestPush:
    def test_sends_the_newest_and_the_history(self, tmp_path, url):
        mirrors.checkpoint_in(tmp_path / "run", 1, {"x": b"1"})
        mirrors.checkpoint_in(tmp_path / "run", 2, {"x": b"2"})

        assert "pushed  model.ckpt-2" in stepguard("push", tmp_path / "run", url)
        assert names(url) == ["model.ckpt-2"]
        assert document("push", tmp_path / "run", url, "--all")["pushed"] == ["model.ckpt-1"]
        assert names(url) == ["model.ckpt-2", "model.ckpt-1"]

    def test_repairs_what_differs_there(self, address, tmp_path):
        place = mirrors.copies(address).remote
        place.put("model.ckpt-2/state.json", b"?" * place.head("model.ckpt-2/state.json").size)

        assert document("push", tmp_path / "run", address)["repaired"] == ["model.ckpt-2/state.json"]
        assert "good" in stepguard("verify", f"{address}/model.ckpt-2")

    def test_sends_nothing_that_is_damaged_here(self, tmp_path, url):
        mirrors.checkpoint_in(tmp_path / "run", 1, {"x": b"12"})
        mirrors.checkpoint_in(tmp_path / "run", 2, {"x": b"22"})
        (tmp_path / "run/model.ckpt-2/x").write_bytes(b"23")

        found = document("push", tmp_path / "run", url, code=1)
        assert (found["pushed"], list(found["damaged"])) == (["model.ckpt-1"], ["model.ckpt-2"])
        assert names(url) == ["model.ckpt-1"]


def test_a_mirror_that_does_not_answer_is_one_line(address, network):
    network.fails(faults.expired)

    assert stepguard("ls", address, code=3).startswith("stepguard: s3://bucket/runs/x")


def test_an_address_where_nothing_is_is_one_line(network):
    assert "expected a mirror, found nothing there" in stepguard("ls", "s3://bucket/none", code=3)


def test_an_address_of_no_store_is_a_mistake_in_the_arguments():
    assert "mirror must be an address such as" in stepguard("ls", "ftp://host/x", code=2)
