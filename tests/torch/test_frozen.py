"""Frozen parameters in a file of their own: what is written, and that each checkpoint stays whole for its readers."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from mounts import mounted
from torch import nn
from torch.distributed.fsdp import fully_shard

from stepguard.cli.main import cli
from stepguard.errors import CheckpointCorruptError
from stepguard.options import Mirror, Restoring, Saving, Stopping
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor, load
from stepguard.torch.checkpoint.tensors import read_tensors
from stepguard.watching import ledger

WIDTH = 512  # A layer of 1 MiB: a smaller file is not shared.


def network(*, frozen=True):
    """A frozen backbone of 3 MiB with a buffer, and a head of 2 kB."""
    torch.manual_seed(3)
    backbone = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.BatchNorm1d(WIDTH))
    net = nn.Sequential()
    net.add_module("backbone", backbone)
    net.add_module("head", nn.Linear(WIDTH, 1))
    backbone.requires_grad_(not frozen)
    return net


def train(logdir, steps, net=None, *, apart=True, unfreeze_at=None, at=None, **options):
    """Train to ``steps``, saving each step; calls what ``at`` has for a step in it; returns the model."""
    net = network() if net is None else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    options = {"save_model_secs": 0, "save_model_steps": 1, "save_summaries_secs": 0, "max_to_keep": 0, **options}
    sv = Supervisor({"model": net, "optimizer": optimizer}, logdir, saving=Saving(frozen_apart=apart), **options)
    with sv.managed_session() as session:
        for _ in session.steps(max_steps=steps):
            (at or {}).get(session.global_step, lambda: None)()
            if unfreeze_at is not None and session.global_step >= unfreeze_at:
                net.backbone[0].requires_grad_(True)
            optimizer.zero_grad()
            net(torch.randn(4, WIDTH)).sum().backward()
            optimizer.step()
            # Each step is saved: none is skipped because the one before is still being written.
            session.save()
    return net


def wait_until(condition, secs=60):
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states_equal(one, other):
    return list(one) == list(other) and all(torch.equal(part, other[name]) for name, part in one.items())


def files_of(logdir, step):
    directory = logdir / f"model.ckpt-{step}"
    return {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}


def written(logdir, step, before):
    """The bytes of the checkpoint of ``step`` that are not those of the one ``before``: what the disk was given."""
    known = {(one.st_dev, one.st_ino) for one in map(os.stat, files_of(logdir, before).values())}
    new = [os.stat(path) for path in files_of(logdir, step).values()]
    return sum(one.st_size for one in new if (one.st_dev, one.st_ino) not in known)


def size(logdir, step):
    return sum(os.stat(path).st_size for path in files_of(logdir, step).values())


class TestAFineTuning:
    def test_writes_what_it_trains(self, tmp_path):
        train(tmp_path, 3)
        whole = size(tmp_path, 3)
        assert whole > 3 * WIDTH * WIDTH * 4
        assert written(tmp_path, 3, before=2) < whole / 50
        assert files_of(tmp_path, 3)["frozen/model.pt"].samefile(files_of(tmp_path, 1)["frozen/model.pt"])

    def test_is_saved_on_a_disk_with_room_for_what_it_trains(self, tmp_path, monkeypatch):
        def usage(_):
            # Less than the backbone of 3 MiB, after the first checkpoint that did not write it.
            free = 2 << 20 if (tmp_path / "model.ckpt-2.manifest.json").exists() else 1 << 40
            return SimpleNamespace(total=1 << 40, free=free)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        train(tmp_path, 3, stopping=Stopping(stop_grace_secs=20))
        assert written(tmp_path, 3, before=2) < 1 << 20

    def test_writes_all_of_it_without_the_option(self, tmp_path):
        train(tmp_path, 2, apart=False)
        assert written(tmp_path, 2, before=1) == size(tmp_path, 2)
        assert "frozen/model.pt" not in files_of(tmp_path, 2)

    def test_sends_the_mirror_what_it_trains(self, tmp_path):
        mirror = tmp_path / "mirror"
        for steps in (1, 2):
            net = train(tmp_path / "run", steps, mirror=Mirror(str(mirror)))
        sent = [one["bytes"] for one in ledger.read(tmp_path / "run") if one["event"] == "mirrored"]
        assert sent[-1] < size(tmp_path / "run", 2) / 50
        assert states_equal(load(mirror)["model"], net.state_dict())

    def test_of_a_model_that_trains_whole_has_no_such_file(self, tmp_path):
        train(tmp_path, 1, network(frozen=False))
        assert "frozen/model.pt" not in files_of(tmp_path, 1)


class TestACheckpoint:
    def test_is_one_whole_state_for_the_library(self, tmp_path):
        net = train(tmp_path, 2)
        found = load(tmp_path)
        assert states_equal(found["model"], net.state_dict())
        assert found["model"]._metadata == net.state_dict()._metadata
        assert list(found) == ["model", "optimizer"]

    def test_is_two_plain_states_for_pytorch_alone(self, tmp_path):
        net = train(tmp_path, 2)
        files = files_of(tmp_path, 2)
        parts = [torch.load(files[name], weights_only=True) for name in ("frozen/model.pt", "model.pt")]
        assert set(parts[0]) == {name for name, one in net.named_parameters() if not one.requires_grad}
        other = network()
        other.load_state_dict({**parts[0], **parts[1]})
        assert states_equal(other.state_dict(), net.state_dict())

    def test_has_the_buffers_of_frozen_layers_with_what_changes(self, tmp_path):
        train(tmp_path, 1)
        saved = torch.load(files_of(tmp_path, 1)["model.pt"], weights_only=True)
        assert "backbone.3.running_mean" in saved
        assert "backbone.3.weight" not in saved

    def test_is_whole_for_the_commands(self, tmp_path):
        train(tmp_path / "apart", 2)
        train(tmp_path / "together", 2, apart=False)
        paths = [str(tmp_path / one / "model.ckpt-2") for one in ("apart", "together")]
        names = [
            sorted(one.name for one in read_tensors(tmp_path / run / "model.ckpt-2")) for run in ("apart", "together")
        ]
        assert [name for name in names[0] if not name.startswith("process-0.apart")] == names[1]
        assert CliRunner().invoke(cli, ["verify", str(tmp_path / "apart")]).exit_code == 0
        shown = CliRunner().invoke(cli, ["diff", *paths]).output
        assert "model." not in shown, shown

    def test_with_damage_in_its_frozen_file_costs_all_that_share_it_and_is_named(self, tmp_path):
        train(tmp_path, 2)
        path = files_of(tmp_path, 2)["frozen/model.pt"]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        shown = CliRunner().invoke(cli, ["verify", str(tmp_path)])
        assert shown.exit_code == 1
        assert "frozen/model.pt" in shown.output

    def test_with_tied_weights_has_each_once(self, tmp_path):
        def tied():
            net = network()
            net.backbone.append(nn.Linear(WIDTH, WIDTH))
            net.backbone[-1].weight = net.backbone[0].weight
            return net

        net = train(tmp_path, 2, tied())
        assert size(tmp_path, 2) < 3.5 * WIDTH * WIDTH * 4
        found = load(tmp_path)["model"]
        assert states_equal(found, net.state_dict())
        assert found["backbone.4.weight"].data_ptr() == found["backbone.0.weight"].data_ptr()
        assert states_equal(train(tmp_path, 2, tied()).state_dict(), net.state_dict())

    def test_keeps_a_frozen_view_of_what_trains_with_that(self, tmp_path):
        net = network()
        net.register_parameter("view", nn.Parameter(net.head.weight.data, requires_grad=False))
        train(tmp_path, 1, net)
        assert "view" not in torch.load(files_of(tmp_path, 1)["frozen/model.pt"], weights_only=True)
        assert torch.equal(load(tmp_path)["model"]["view"], net.head.weight)


def tampered(run, root, change):
    """A copy of ``run`` whose step 2 was committed again after ``change``: its digests are right."""
    shutil.copytree(run, root)
    store = CheckpointStore(root, engine="torch")
    stage = store.stage("model.ckpt-2")
    changed = shutil.copytree(run / "model.ckpt-2", stage / "model.ckpt-2")
    change(changed)
    store.commit("model.ckpt-2", 2)


def with_places(places):
    def change(checkpoint):
        process = torch.load(checkpoint / "process-0.pt", weights_only=True)
        torch.save(process | {"apart": places}, checkpoint / "process-0.pt")

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda checkpoint: (checkpoint / "model.pt").unlink(),
        *map(with_places, ([1], 3, {"model": 3}, {"model": [[1], [2]]}, {"model": None})),
    ],
)
def test_content_that_nobody_has_saved_is_damage_and_costs_a_step(change, tmp_path):
    run, root = tmp_path / "run", tmp_path / "tampered"
    train(run, 2)
    tampered(run, root, change)

    done = CliRunner().invoke(cli, ["export", str(root), str(tmp_path / "out.pt"), "--weights"])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit), done.exception
    assert "model: expected " in done.output
    with pytest.raises(CheckpointCorruptError, match="model: expected "):
        load(root)
    with Supervisor({"model": network()}, root, save_model_secs=0).managed_session() as session:
        assert session.global_step == 1
    assert (root / "quarantine" / "model.ckpt-2").exists()


class TestARestart:
    @pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
    def test_goes_on_with_and_without_the_option(self, before, after, tmp_path):
        ended = train(tmp_path, 2, apart=before)
        other = network()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert states_equal(train(tmp_path, 2, other, apart=after).state_dict(), ended.state_dict())
        train(tmp_path, 3, apart=after)
        assert ("frozen/model.pt" in files_of(tmp_path, 3)) is after

    def test_shares_the_file_with_the_run_before(self, tmp_path):
        train(tmp_path, 1)
        train(tmp_path, 2)
        assert written(tmp_path, 2, before=1) < size(tmp_path, 2) / 50

    def test_goes_on_where_a_layer_was_unfrozen_on_the_way(self, tmp_path):
        ended = train(tmp_path, 3, unfreeze_at=1)
        assert "backbone.0.weight" in torch.load(files_of(tmp_path, 3)["model.pt"], weights_only=True)
        assert "backbone.0.weight" in torch.load(files_of(tmp_path, 1)["frozen/model.pt"], weights_only=True)
        net = train(tmp_path, 3)
        assert net.backbone[0].weight.requires_grad
        assert states_equal(net.state_dict(), ended.state_dict())

    def test_with_other_layers_frozen_goes_on(self, tmp_path):
        ended = train(tmp_path, 2)
        net = network(frozen=False)
        optimizer = torch.optim.SGD(net.parameters())
        sv = Supervisor({"model": net, "optimizer": optimizer}, tmp_path, restoring=Restoring(only=["model"]))
        with sv.managed_session():
            assert states_equal(net.state_dict(), ended.state_dict())

    def test_restores_a_part_of_the_model(self, tmp_path):
        ended = train(tmp_path, 2)
        net = network()
        before = net.backbone[0].weight.clone()
        options = Restoring(leave_out=["model.backbone.0.weight"])
        sv = Supervisor({"model": net}, tmp_path, restoring=options)
        with sv.managed_session():
            assert torch.equal(net.backbone[0].weight, before)
            assert torch.equal(net.head.weight, ended.head.weight)

    def test_takes_its_first_weights_from_such_a_run(self, tmp_path):
        ended = train(tmp_path / "first", 2)
        net = network()
        sv = Supervisor({"model": net}, tmp_path / "second", restoring=Restoring(init_from=tmp_path / "first"))
        with sv.managed_session():
            assert states_equal(net.state_dict(), ended.state_dict())


@contextlib.contextmanager
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_sharded_model_has_its_frozen_parameters_in_a_second_file(tmp_path):
    def sharded():
        net = network()
        return fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))

    with alone():
        net = train(tmp_path, 2, sharded())
        ended = {name: getattr(one, "full_tensor", lambda one=one: one)() for name, one in net.state_dict().items()}
        # Each value has an archive of its own.
        assert written(tmp_path, 2, before=1) < size(tmp_path, 2) / 30
        assert files_of(tmp_path, 2)["__0_1.distcp"].samefile(files_of(tmp_path, 1)["__0_1.distcp"])
        again = train(tmp_path, 2, sharded()).state_dict()
        assert torch.equal(again["backbone.0.weight"].full_tensor(), ended["backbone.0.weight"])
    assert states_equal(load(tmp_path)["model"], ended)
    assert states_equal(train(tmp_path, 2).state_dict(), ended)
    store = CheckpointStore(tmp_path)
    assert all(store.verify(one).is_committed for one in store.candidates())


class TestOnASmallDisk:
    """With less room than the backbone of 3 MiB, and more than what a step changes."""

    @pytest.fixture
    def disk(self, tmp_path):
        with mounted(tmp_path / "disk") as mount:
            yield mount

    @pytest.mark.parametrize("kept", [0, 1])
    def test_a_start_saves_what_it_trains(self, kept, disk):
        logdir = disk.path / "run"
        train(logdir, 1)
        disk.fill(leave_megabytes=2)
        train(logdir, 3, max_to_keep=kept, stopping=Stopping(stop_grace_secs=20))
        assert load(logdir).step == 3

    def test_the_second_save_of_a_run_does_too(self, disk):
        logdir = disk.path / "run"

        def fill_once_saved():
            wait_until((logdir / "model.ckpt-1.manifest.json").exists)
            disk.fill(leave_megabytes=2)

        train(logdir, 3, at={1: fill_once_saved}, stopping=Stopping(stop_grace_secs=20))
        assert load(logdir).step == 3

    def test_a_save_that_found_it_full_is_made_when_there_is_room_for_that(self, disk, caplog):
        logdir = disk.path / "run"

        def fill_once_saved():
            wait_until((logdir / "model.ckpt-1.manifest.json").exists)
            disk.fill()

        def make_room():
            wait_until(lambda: "a checkpoint needs about" in caplog.text)
            disk.fill().unlink()
            disk.fill(leave_megabytes=2)

        train(logdir, 4, at={1: fill_once_saved, 3: make_room}, stopping=Stopping(stop_grace_secs=30))
        assert load(logdir).step == 4
        assert written(logdir, 4, before=1) < 1 << 20
