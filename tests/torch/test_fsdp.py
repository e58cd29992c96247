"""Models that are spread over the processes by fully_shard: all write their parts, and one checkpoint is committed."""

from __future__ import annotations

import errno
import pickle
import shutil
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from distributed_training import add_frozen, digest, network, wrapped
from launch import began, outcomes, seen, steps_saved, terminate_one
from launch import train as train_together
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from stepguard.cli.main import cli
from stepguard.errors import CheckpointError, CheckpointMismatchError, NonFiniteError
from stepguard.steps.part_messages import PartMessages
from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor, load
from stepguard.torch.checkpoint.sharded_files import METADATA
from stepguard.torch.checkpoint.tensors import read_tensors
from stepguard.torch.distributed.joint_write import write_all, write_mine
from stepguard.torch.distributed.world import TorchStore

pytestmark = [
    pytest.mark.timeout(400),
    # Of PyTorch's own tools, when they are used without a process group.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of two processes that nobody disturbs."""
    logdir = tmp_path_factory.mktemp("whole") / "run"
    train_together(logdir, 2, "--steps=24", "--wrap=fsdp", "--save-steps=4", "--awaits-saves")
    return logdir


@pytest.fixture
def logdir(whole_run, tmp_path):
    """A copy of its logdir."""
    return shutil.copytree(whole_run, tmp_path / "run")


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def program_state(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=17)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def train(logdir, steps, net=None, wrap="none"):
    """In this process alone; the digest of what was restored, and that at the end."""
    net = network() if net is None else net
    model = wrapped(net, wrap)
    state = program_state(model)
    optimizer, scheduler = state["optimizer"], state["scheduler"]
    sv = Supervisor(state, logdir, save_summaries_secs=0)
    with sv.managed_session() as session:
        first = digest(net, optimizer)
        for _ in session.steps(max_steps=steps):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            scheduler.step()
    return first, digest(net, optimizer)


def recommit(logdir, name):
    """Somebody who can write to the logdir can also make the digests right."""
    CheckpointStore(logdir, engine="torch").commit_in_place(name, int(name.rpartition("-")[2]))


def test_one_killed_and_all_killed_change_nothing(whole_run, tmp_path):
    killed = tmp_path / "killed"
    options = ["--steps=24", "--wrap=fsdp", "--save-steps=3"]
    for at, ranks in ((10, [1]), (16, [0, 1])):
        kills = [f"--kill={rank}:{at}" for rank in ranks]
        train_together(killed, 2, *options, *kills, "--kill-once-saved=0", killed=ranks)
    train_together(killed, 2, *options)

    assert outcomes(killed, 2) == outcomes(whole_run, 2)
    for rank in range(2):
        assert seen(killed, rank) == seen(whole_run, rank)


def test_one_whose_disk_is_full_and_then_sigterm(tmp_path):
    logdir = tmp_path / "run"
    errors = terminate_one(logdir, 1, "--wrap=fsdp", "--full-disk=1")

    assert "failed (rank 1 could not write its part" in errors[0].replace("[Errno 28] ", "")
    last = [max(seen(logdir, each)) for each in range(2)]
    assert last[0] == last[1]
    assert steps_saved(logdir)[0] == last[0] + 1
    store = CheckpointStore(logdir)
    assert all(store.verify(one).is_committed for one in store.candidates())


def test_each_process_writes_its_frozen_parameters_once(tmp_path):
    logdir = tmp_path / "run"
    train_together(logdir, 2, "--steps=12", "--wrap=fsdp", "--save-steps=4", "--step-secs=0.1", "--frozen")
    last, before = (logdir / f"model.ckpt-{step}" for step in steps_saved(logdir)[:2])
    for rank in range(2):
        assert (last / f"__{rank}_1.distcp").samefile(before / f"__{rank}_1.distcp")
        assert not (last / f"__{rank}_0.distcp").samefile(before / f"__{rank}_0.distcp")
    assert torch.equal(load(logdir)["model"]["0.table"], torch.ones(1024, 640))

    net = network()
    add_frozen(net)
    assert train(logdir, 12, net)[0] == outcomes(logdir, 1)[0].split()[1]


class TestAnotherNumberOfProcesses:
    def digest_of(self, whole_run):
        return outcomes(whole_run, 1)[0].split()[1]

    def test_two_then_one_without_sharding(self, whole_run, logdir):
        restored, _ = train(logdir, 25)

        assert restored == self.digest_of(whole_run)
        assert steps_saved(logdir)[0] == 25

    def test_two_then_one_with_sharding(self, whole_run, logdir, alone):
        restored, ended = train(logdir, 25, wrap="fsdp")

        assert restored == self.digest_of(whole_run)
        assert train(logdir, 25, wrap="fsdp")[0] == ended

    @pytest.mark.parametrize("wrap", ["none", "fsdp"])
    def test_one_then_two(self, wrap, tmp_path, alone):
        _, ended = train(tmp_path / "run", 3, wrap=wrap)
        train_together(tmp_path / "run", 2, "--steps=4", "--wrap=fsdp")

        assert began(tmp_path / "run", 2) == [f"3 {ended}"] * 2


class TestDamage:
    @pytest.mark.parametrize("damage", ["flipped", "missing"])
    def test_in_the_file_of_one_process_costs_steps_and_not_the_run(self, damage, logdir, caplog):
        part = logdir / "model.ckpt-24" / "__1_0.distcp"
        if damage == "flipped":
            content = bytearray(part.read_bytes())
            content[len(content) // 2] ^= 1
            part.write_bytes(content)
        else:
            part.unlink()
        before = steps_saved(logdir)[1]
        net = network()
        sv = Supervisor(program_state(net), logdir)
        with sv.managed_session() as session:
            assert session.global_step == before

        assert "__1_0.distcp" in caplog.text
        assert (logdir / "quarantine" / "model.ckpt-24").is_dir()


class TestWhatIsRead:
    def test_by_pytorch_alone(self, logdir, tmp_path):
        path = logdir / "model.ckpt-24"
        dcp_to_torch_save(path, tmp_path / "all.pt")
        saved = torch.load(tmp_path / "all.pt", weights_only=True)
        net = network()
        state = {"model": net.state_dict()}
        dcp.load(state, checkpoint_id=path)

        assert set(saved) == {"model", "optimizer"}
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, saved["model"][name])

    def test_by_the_command(self, logdir):
        path = logdir / "model.ckpt-24"
        net = network()
        dcp.load({"model": net.state_dict()}, checkpoint_id=path)

        tensors = {one.name: one for one in read_tensors(path)}
        for name, tensor in net.state_dict().items():
            found = tensors[f"model.{name}"]
            assert (found.shape, found.nbytes) == (tuple(tensor.shape), tensor.numel() * 4)
            assert (found.read() == tensor.numpy()).all()
        assert tensors["optimizer.param_groups[0].weight_decay"].read() == 0.01
        assert tensors["process-0.global_step"].read() == 24
        assert not [name for name in tensors if "sharded" in name]
        pairs = ([str(path), str(logdir / one)] for one in (path.name, "model.ckpt-16"))
        same, other = (CliRunner().invoke(cli, ["diff", *pair]) for pair in pairs)
        assert (same.exit_code, other.exit_code) == (0, 1), same.output + other.output
        (path / "__1_0.distcp").write_bytes(b"")
        shown = CliRunner().invoke(cli, ["show", str(path)])
        assert shown.exit_code in (1, 3)
        assert "Traceback" not in shown.output

    def test_runs_no_code_from_the_metadata(self, logdir, tmp_path):
        trap = tmp_path / "sprung"

        class Trap:
            def __reduce__(self):
                return (open, (str(trap), "w"))

        metadata = logdir / "model.ckpt-24" / METADATA
        content = pickle.loads(metadata.read_bytes())
        content.planner_data = Trap()
        metadata.write_bytes(pickle.dumps(content))
        recommit(logdir, "model.ckpt-24")

        with pytest.raises(CheckpointError, match=r"\.metadata: .*found a reference to \w+\.open"):
            train(logdir, 25)
        assert not trap.exists()

    def test_runs_no_code_from_a_part(self, logdir, tmp_path):
        trap = tmp_path / "sprung"

        class Trap:
            def __reduce__(self):
                return (open, (str(trap), "w"))

        directory = logdir / "model.ckpt-24"
        metadata = pickle.loads((directory / METADATA).read_bytes())
        torch.save(Trap(), directory / "__0_0.distcp")
        for place in metadata.storage_data.values():
            place.relative_path, place.offset = "__0_0.distcp", 0
            place.length = (directory / "__0_0.distcp").stat().st_size
        (directory / METADATA).write_bytes(pickle.dumps(metadata))
        recommit(logdir, "model.ckpt-24")

        with pytest.raises(CheckpointError, match="could run code"):
            train(logdir, 25)
        assert not trap.exists()

    def test_lies_beside_the_metadata(self, logdir):
        metadata = logdir / "model.ckpt-24" / METADATA
        content = pickle.loads(metadata.read_bytes())
        next(iter(content.storage_data.values())).relative_path = "../model.ckpt-20/__0_0.distcp"
        metadata.write_bytes(pickle.dumps(content))
        recommit(logdir, "model.ckpt-24")
        before = steps_saved(logdir)[1]
        net = network()
        sv = Supervisor(program_state(net), logdir)
        with sv.managed_session() as session:
            assert session.global_step == before


class TestMisfit:
    def test_is_named_and_nothing_is_changed(self, logdir, alone):
        net = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.2), nn.Linear(16, 1, bias=False), nn.Linear(1, 1))
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        with pytest.raises(CheckpointMismatchError, match="Nothing was changed") as caught:
            train(logdir, 25, net, wrap="fsdp")

        assert caught.value.reshaped["model.0.weight"] == ("[16, 5]", "[16, 4]")
        assert set(caught.value.missing) >= {"model.3.weight", "model.3.bias"}
        assert caught.value.unexpected == ("model.2.bias", "optimizer: the parameter model.2.bias")
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor.full_tensor(), before[name])


@pytest.mark.parametrize("kind", ["PowerSGDState", "PostLocalSGDState", None])
def test_a_communication_hook_that_counts_its_iterations_is_told_of_at_a_restart(kind, alone, tmp_path, caplog):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook

    for end in (1, 2):
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        if kind == "PowerSGDState":
            model.register_comm_hook(powerSGD_hook.PowerSGDState(None, 1), powerSGD_hook.powerSGD_hook)
        elif kind is None:
            model.register_comm_hook(None, default_hooks.allreduce_hook)
        else:
            state = post_localSGD_hook.PostLocalSGDState(None, dist.group.WORLD, 1)
            model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
        with Supervisor({"model": model}, tmp_path, save_summaries_secs=0).managed_session() as sess:
            for _ in sess.steps(max_steps=end):
                model(torch.ones(1, 2)).sum().backward()
        assert ("a communication hook" in caplog.text) == (end == 2 and kind is not None)
    assert kind is None or f"keeps a {kind}, which is not saved" in caplog.text


class TestStateThatCannotBeSaved:
    def test_a_model_whose_state_is_a_collective_operation(self, alone, tmp_path):
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        nn.Module.__init__(model)
        with pytest.raises(TypeError, match=r"state\['model'\].*fully_shard"):
            Supervisor({"model": nn.Sequential(model)}, tmp_path)

    def test_a_sum_that_was_not_made(self, alone, tmp_path):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial

        model = nn.Linear(1, 1)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(DTensor.from_local(torch.ones(1, 1), mesh, [Partial()]))
        with pytest.raises(TypeError, match=r"model\.weight.*Partial"):
            Supervisor({"model": model}, tmp_path)

    def test_a_sparse_tensor_beside_sharded_ones(self, alone, tmp_path):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        model = nn.Linear(1, 1)
        model.weight = nn.Parameter(distribute_tensor(torch.ones(1, 1), init_device_mesh("cpu", (1,))))
        model.register_buffer("adjacency", torch.eye(2).to_sparse())
        with pytest.raises(TypeError, match=r"model\.adjacency.*sparse_coo"):
            Supervisor({"model": model}, tmp_path)


class TestExchange:
    """Two processes as two threads: what the one says when the other cannot write."""

    def write(self, directory, theirs, has_ended=False, take=None):
        store = TorchStore(dist.HashStore())

        def check_alive(what):
            if has_ended:
                raise CheckpointError(what)

        states = {"model": {"weight": torch.ones(2)}}
        chief = PartMessages(store, 0, 2, check_alive)
        other = PartMessages(store, 1, 2, lambda _: None)
        thread = threading.Thread(target=write_mine, args=(other, 1, theirs, take or (lambda: states), {}))
        if not has_ended:
            thread.start()
        try:
            return write_all(chief, directory, states, {})
        finally:
            if not has_ended:
                thread.join(60)
                assert not thread.is_alive()

    def test_both_write(self, tmp_path):
        written = self.write(tmp_path, tmp_path)

        assert sorted(written) == ["__0_0.distcp", "__1_0.distcp"]
        assert (tmp_path / METADATA).exists()

    def test_one_does_not_see_the_directory(self, tmp_path):
        with pytest.raises(OSError, match=r"rank 1 could not write its part.*same logdir") as caught:
            self.write(tmp_path, tmp_path / "elsewhere")
        assert caught.value.errno == errno.ENOENT
        assert not (tmp_path / METADATA).exists()

    def test_the_chief_itself_cannot_write(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            self.write(tmp_path / "nowhere", tmp_path)

    def test_the_state_of_one_is_not_finite(self, tmp_path):
        def take():
            raise NonFiniteError("the state is not finite: model.weight", step=7, names=["model.weight"])

        with pytest.raises(NonFiniteError, match=r"rank 1: the state is not finite: model\.weight") as caught:
            self.write(tmp_path, tmp_path, take=take)
        assert (caught.value.step, caught.value.names) == (7, ("model.weight",))
        assert not (tmp_path / METADATA).exists()

    def test_one_has_ended(self, tmp_path):
        with pytest.raises(CheckpointError, match="has/1"):
            self.write(tmp_path, tmp_path, has_ended=True)
