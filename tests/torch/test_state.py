"""What can be saved, how it is copied, and what is said when a checkpoint does not fit."""

from __future__ import annotations

import gc
import io
import random
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import Training

from stepguard.errors import CheckpointMismatchError
from stepguard.store import CheckpointStore, tensorflow_files
from stepguard.torch import Supervisor, Values, load
from stepguard.torch.checkpoint.packed import unpacked
from stepguard.torch.checkpoint.snapshot import CopyStreams, HostMemory


def run(state, logdir, steps=1):
    with Supervisor(state, logdir).managed_session() as session:
        for _ in session.steps(max_steps=steps):
            pass


PARTS = [torch.ones(2), torch.ones(3)]


class OperationsCounted(TorchDispatchMode):
    """The number of PyTorch's operations in a block."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += 1
        return operation(*args, **(kwargs or {}))


class Holder:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@dataclass
class Odd:
    number: int = 3


class TestStateThatCannotBeSaved:
    @pytest.mark.parametrize(
        ("state", "named"),
        [
            ({"inner": {"list": [1, Odd()]}}, r"thing\.inner\.list\[1\].*Odd"),
            ({"call": len}, r"thing\.call.*builtin_function"),
            ({"weights": torch.empty(3, device="meta")}, r"thing\.weights.*meta"),
            ({Odd: 1}, r"key"),
            ({"parts": torch.nested.nested_tensor(PARTS, layout=torch.jagged)}, r"thing\.parts.*nested.*unbind"),
        ],
    )
    def test_is_named_when_the_supervisor_is_made(self, state, named, tmp_path):
        with pytest.raises(TypeError, match=named):
            Supervisor({"thing": Holder(state)}, tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a layout that is not sparse either")
    def test_is_named_if_it_is_of_a_layout_of_one_machine(self, tmp_path):
        with pytest.raises(TypeError, match=r"thing\.packed\[0\].*_mkldnn.*to_dense"):
            Supervisor({"thing": Holder({"packed": [torch.ones(2, 2).to_mkldnn()]})}, tmp_path)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
    def test_is_named_also_if_pytorch_has_not_even_a_shape_for_it(self, tmp_path):
        model = nn.Module()
        model.register_buffer("parts", torch.nested.nested_tensor(PARTS))
        with pytest.raises(TypeError, match=r"model\.parts.*nested"):
            Supervisor({"model": model}, tmp_path)
        with pytest.raises(TypeError, match=r"model\.weight.*lazy module.*run one batch"):
            Supervisor({"model": nn.LazyLinear(3)}, tmp_path)
        with pytest.raises(TypeError, match=r"model\.running_mean.*lazy module"):
            Supervisor({"model": nn.LazyBatchNorm1d(affine=False)}, tmp_path)

    def test_and_came_later_stops_the_run_and_is_named(self, tmp_path):
        values = Values(best=0)
        sv = Supervisor({"values": values}, tmp_path)
        with pytest.raises(TypeError, match=r"values\.best.*Odd"), sv.managed_session() as session:
            for _ in session.steps(max_steps=1):
                values.best = Odd()

    @pytest.mark.parametrize(
        ("state", "error"),
        [
            ({}, "at least one object"),
            (nn.Linear(1, 1), "a dictionary"),
            ({"a/b": nn.Linear(1, 1)}, "names of letters"),
            ({"process-0": nn.Linear(1, 1)}, "names of letters"),
            ({"rate": 0.1}, r"state\['rate'\].*Values"),
            ({"scheduler": None}, r"state\['scheduler'\].*found None: leave 'scheduler' out"),
        ],
    )
    def test_what_is_no_state_at_all_is_refused(self, state, error):
        with pytest.raises((TypeError, ValueError), match=error):
            Supervisor(state)

    def test_an_object_whose_state_cannot_be_read(self, tmp_path):
        class Unread(Holder):
            def state_dict(self):
                raise RuntimeError("gather it first")

        with pytest.raises(TypeError, match=r"state\['trainer'\].*Unread raises RuntimeError: gather it first"):
            Supervisor({"trainer": Unread(None)}, tmp_path)

    def test_an_optimizer_whose_state_other_processes_have(self, tmp_path):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer.__new__(ZeroRedundancyOptimizer)
        with pytest.raises(TypeError, match=r"state\['optimizer'\].*ZeroRedundancyOptimizer.*fully_shard"):
            Supervisor({"optimizer": optimizer}, tmp_path)


class TestACheckpointThatDoesNotFit:
    def save(self, tmp_path):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        run({"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}, tmp_path)

    def restore(self, tmp_path, model, **others):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointMismatchError) as caught:
            run({"model": model, **others}, tmp_path)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        return caught.value

    def test_names_what_has_another_shape(self, tmp_path):
        self.save(tmp_path)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        error = self.restore(tmp_path, model, optimizer=torch.optim.SGD(model.parameters(), 0.1))

        assert error.reshaped == {"model.1.weight": ("[4, 3]", "[1, 3]"), "model.1.bias": ("[4]", "[1]")}
        assert "model.1.weight (expected [4, 3], found [1, 3])" in str(error)

    def test_hints_at_a_checkpoint_that_can_be_read_by_hand(self, tmp_path):
        self.save(tmp_path)
        error = self.restore(tmp_path, nn.Linear(1, 1))

        (path,) = re.findall(r"stepguard\.torch\.load\('(.+)'\)", str(error))
        assert set(load(path)) == {"model", "optimizer"}

    def test_names_what_was_dense_and_is_sparse(self, tmp_path):
        def build(adjacency):
            model = nn.Linear(1, 1)
            model.register_buffer("adjacency", adjacency)
            return model

        run({"model": build(torch.eye(2))}, tmp_path)
        with pytest.raises(CheckpointMismatchError) as caught:
            run({"model": build(torch.eye(2).to_sparse())}, tmp_path)

        assert caught.value.reshaped == {"model.adjacency": ("torch.sparse_coo", "torch.strided")}

    def test_names_what_is_missing_and_what_is_too_much(self, tmp_path):
        self.save(tmp_path)
        model = nn.Sequential(OrderedDict(first=nn.Linear(2, 3), second=nn.Linear(3, 1)))
        error = self.restore(tmp_path, model, scheduler=Values())

        assert error.missing == (
            "scheduler",
            "model.first.weight",
            "model.first.bias",
            "model.second.weight",
            "model.second.bias",
        )
        assert error.unexpected == ("optimizer", "model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias")

    def test_names_another_optimizer(self, tmp_path):
        self.save(tmp_path)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        error = self.restore(tmp_path, model, optimizer=torch.optim.Adam(model.parameters()))

        assert "optimizer.param_groups[0].betas" in error.missing
        assert "optimizer.param_groups[0].momentum" in error.unexpected

    def test_names_an_optimizer_of_another_number_of_parameters(self, tmp_path):
        self.save(tmp_path)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        error = self.restore(tmp_path, model, optimizer=torch.optim.SGD(model[0].parameters(), 0.1))

        assert error.unexpected == ("optimizer: the parameter model.1.bias", "optimizer: the parameter model.1.weight")

    @pytest.mark.parametrize(
        ("kind", "kept"),
        [(torch.optim.Adam, "exp_avg"), (torch.optim.RMSprop, "square_avg"), (torch.optim.Rprop, "prev")],
    )
    def test_names_what_an_optimizer_kept_for_nameless_parameters_in_another_order(self, kind, kept, tmp_path):
        def build(order):
            model = nn.Linear(2, 3)
            # Parameters in no module have no names.
            held = Values(weight=model.weight.detach(), bias=model.bias.detach())
            return {"model": held, "optimizer": kind(list(model.parameters())[::order])}, model

        first, model = build(1)
        model(torch.ones(2)).sum().backward()
        first["optimizer"].step()
        run(first, tmp_path)
        run(build(1)[0], tmp_path)
        error = self.restore(tmp_path, **build(-1)[0])

        assert error.reshaped[f"optimizer.state[0].{kept}"] == ("[3]", "[3, 2]")
        assert error.reshaped[f"optimizer.state[1].{kept}"] == ("[3, 2]", "[3]")
        assert f"optimizer.state[0].{kept} (expected [3], found [3, 2])" in str(error)

    def test_leaves_alone_what_an_optimizer_of_another_make_keeps_in_a_smaller_form(self, tmp_path):
        class LowRank(torch.optim.SGD):
            def step(self):
                for parameter in self.param_groups[0]["params"]:
                    self.state[parameter]["exp_avg"] = torch.ones(1)

        def build():
            model = nn.Linear(2, 3)
            return {"model": model, "optimizer": LowRank(model.parameters(), 0.1)}

        first, second = build(), build()
        first["optimizer"].step()
        run(first, tmp_path)
        run(second, tmp_path, steps=2)

        assert [kept["exp_avg"].tolist() for kept in second["optimizer"].state.values()] == [[1.0], [1.0]]

    @pytest.mark.parametrize(
        ("build", "kind"),
        [
            (torch.Generator, "Generator"),
            (lambda: random.Random(1), "Random"),
            (lambda: __import__("numpy").random.default_rng(1), "Generator"),
            (lambda: torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), "SGD"),
        ],
        ids=["torch.Generator", "random.Random", "numpy.random.Generator", "an optimizer"],
    )
    def test_names_what_was_of_another_kind(self, build, kind, tmp_path):
        model = nn.Linear(2, 1)
        run({"model": model, "draws": Values(best=1, seen=2)}, tmp_path)
        error = self.restore(tmp_path, nn.Linear(2, 1), draws=build())

        assert error.reshaped == {"draws": (f"the state of a {kind}", "values named best, seen")}
        assert "draws (expected the state of a" in str(error)

    def test_because_a_program_of_another_framework_wrote_it(self, tmp_path):
        store = CheckpointStore(tmp_path, engine="tensorflow", saver_files=tensorflow_files)
        stage = store.stage("model.ckpt-7")
        for suffix in (".index", ".data-00000-of-00001"):
            (stage / f"model.ckpt-7{suffix}").write_bytes(b"weights")
        store.commit("model.ckpt-7", 7)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

        error = self.restore(tmp_path, nn.Linear(2, 1))

        assert "expected a checkpoint of the engine 'torch', found one of 'tensorflow'" in str(error)
        assert "Use another logdir" in str(error)
        assert error.path == tmp_path / "model.ckpt-7"
        assert {name: (tmp_path / name).read_bytes() for name in before} == before


class TestWhatIsRestored:
    def test_plain_values_and_generators(self, tmp_path):
        def build():
            import numpy as np

            return {
                "values": Values(number=1, text="a", nested={"list": [1, (2.5, None)]}, tensor=torch.arange(3)),
                "noise": torch.Generator().manual_seed(7),
                "order": random.Random(8),
                "draws": np.random.default_rng(9),
            }

        def draw(state):
            return torch.rand(2, generator=state["noise"]).tolist(), state["order"].random(), state["draws"].random()

        first, second = build(), build()
        draw(first)
        first["values"].number = 2
        run(first, tmp_path)
        run(second, tmp_path, steps=2)

        assert second["values"].number == 2
        assert second["values"].nested == {"list": [1, (2.5, None)]}
        assert second["values"].tensor.tolist() == [0, 1, 2]
        assert draw(second) == draw(first)

    @pytest.mark.parametrize("kind", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
    def test_every_generator_of_numpy(self, kind, tmp_path):
        import numpy as np

        def build(seed):
            return {"draws": np.random.Generator(getattr(np.random, kind)(seed))}

        first, second = build(1), build(2)
        # An odd number of draws of 32 bits leaves half a draw of 64 bits for later.
        first["draws"].integers(9, size=3, dtype="uint32")
        run(first, tmp_path)
        run(second, tmp_path, steps=2)

        drawn = first["draws"].integers(2**32, size=5, dtype="uint32"), first["draws"].normal(size=700)
        again = second["draws"].integers(2**32, size=5, dtype="uint32"), second["draws"].normal(size=700)
        assert [one.tolist() for one in again] == [one.tolist() for one in drawn]

    @pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC|invariant)")
    @pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
    def test_sparse_tensors(self, layout, tmp_path):
        def build(dense):
            arguments = [(2, 2)] if layout.startswith("b") else []
            convert = getattr(dense, "to_sparse" if layout == "coo" else f"to_sparse_{layout}")
            model = nn.Module()
            model.register_buffer("adjacency", convert(*arguments))
            return {"model": model, "values": Values(seen=convert(*arguments))}

        dense = torch.tensor([[0.0, 1, 0, 0], [0, 0, 2, 0], [3, 0, 0, 4], [0, 0, 0, 0]])
        first, second = build(dense), build(torch.eye(4))
        run(first, tmp_path)
        assert torch.load(tmp_path / "model.ckpt-1" / "model.pt", weights_only=True)["adjacency"].layout == (
            getattr(torch, f"sparse_{layout}")
        )
        run(second, tmp_path, steps=2)

        for restored in (second["model"].adjacency, second["values"].seen):
            assert restored.layout is first["model"].adjacency.layout
            assert torch.equal(restored.to_dense(), dense)

    def test_a_sparse_tensor_with_doubles_as_it_was(self, tmp_path):
        def build(values):
            return {"values": Values(seen=torch.sparse_coo_tensor([[1, 1]], values, (3,), check_invariants=True))}

        second = build([5.0, 6.0])
        run(build([1.0, 2.0]), tmp_path)
        run(second, tmp_path, steps=2)

        seen = second["values"].seen
        assert not seen.is_coalesced()
        assert (seen._indices().tolist(), seen._values().tolist()) == ([[1, 1]], [1.0, 2.0])

    def test_a_value_that_was_never_saved_keeps_what_the_program_gives_it_and_is_named(self, tmp_path, caplog):
        run({"values": Values(lowest=1.0, dropped="saved")}, tmp_path)
        extended = Values(lowest=9.0, patience=7, waits=3)
        run({"values": extended}, tmp_path, steps=2)

        assert vars(extended) == {"lowest": 1.0, "dropped": "saved", "patience": 7, "waits": 3}
        warned = [record.getMessage() for record in caplog.records if record.name == "stepguard.steps.values"]
        assert len(warned) == 1
        assert warned[0].endswith("as the program has them: patience=7, waits=3")

    def test_tied_weights_stay_tied_and_are_saved_once(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = nn.Linear(300, 300, bias=False)
                self.outside = nn.Linear(300, 300, bias=False)
                self.outside.weight = self.inside.weight

        first, second = Tied(), Tied()
        run({"model": first}, tmp_path)
        run({"model": second}, tmp_path, steps=2)

        assert (tmp_path / "model.ckpt-1" / "model.pt").stat().st_size < 1.1 * 300 * 300 * 4
        assert torch.equal(first.inside.weight, second.inside.weight)
        assert second.outside.weight is second.inside.weight

    def test_the_files_are_read_by_pytorch_alone(self, tmp_path):
        training = Training(tmp_path).train(3)
        saved = torch.load(tmp_path / "model.ckpt-3" / "model.pt", weights_only=True)

        training.model.load_state_dict(saved)
        assert torch.load(tmp_path / "model.ckpt-3" / "process-0.pt", weights_only=True)["global_step"] == 3

    def test_no_code_from_a_file_is_run(self, tmp_path):
        """A file whose digest is right, by somebody who can write to the logdir."""
        from stepguard.disk import files

        Training(tmp_path).train(1)
        trap = tmp_path / "sprung"

        class Trap:
            def __reduce__(self):
                return (open, (str(trap), "w"))

        torch.save(Trap(), tmp_path / "model.ckpt-1" / "model.pt")
        store = CheckpointStore(tmp_path, engine="torch")
        store.commit_in_place("model.ckpt-1", 1)
        assert files.digest(tmp_path / "model.ckpt-1" / "model.pt")

        with pytest.raises(Exception, match=r"could run code: nothing of it was used"):
            Training(tmp_path).train(2)
        assert not trap.exists()


class TestHostMemory:
    def test_is_used_again_and_holds_what_was_copied(self):
        memory, streams = HostMemory(), CopyStreams({})
        live = {"a": torch.ones(4), "b": [torch.zeros(2, 2).t(), 5]}
        first = memory.copy("x", live, streams)
        live["a"] += 1
        assert first["a"].tolist() == [1.0] * 4
        second = memory.copy("x", live, streams)

        assert second["a"].data_ptr() == first["a"].data_ptr()
        assert second["a"].tolist() == [2.0] * 4

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.eye(3).to_sparse(),
            torch.ones(2, dtype=torch.bfloat16),
            torch.ones(1, dtype=torch.float8_e4m3fn),
            torch.ones(3).expand(2, 3),
            torch.empty(0),
            torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        ],
        ids=str,
    )
    def test_takes_every_kind_of_tensor(self, tensor):
        copied = HostMemory().copy("x", {"t": tensor}, CopyStreams({}))
        buffer = io.BytesIO()
        torch.save(copied, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)["t"]

        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded.to_dense().float(), tensor.to_dense().float())


class TestNothingOfAFileIsKept:
    """The tensors that are read are those of a mapped file, which is pruned, or may be damaged, later."""

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.zeros(1000))

        def _load_from_state_dict(self, state, prefix, *_):
            self.kept = state[prefix + "kept"]

    def mapped(self):
        return {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines()}

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
    @pytest.mark.parametrize("kind", ["a module", "an optimizer", "values"])
    def test_by(self, kind, tmp_path):
        def build():
            module = self.Keeping()
            linear = nn.Linear(50, 50)
            optimizer = torch.optim.Adam(linear.parameters())
            return {
                "a module": {"module": module},
                "an optimizer": {"model": linear, "optimizer": optimizer},
                "values": {"values": Values(tensor=torch.zeros(1000))},
            }[kind]

        first = build()
        if kind == "an optimizer":
            first["model"](torch.ones(50)).sum().backward()
            first["optimizer"].step()
        run(first, tmp_path)
        second = build()
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            from stepguard.torch.checkpoint import restore

            def read_file(path, **options):
                state = original(path, **options)
                seen.extend(name for name in self.mapped() if name.endswith(".pt"))
                return state

            original = restore.read_file
            patch.setattr(restore, "read_file", read_file)
            run(second, tmp_path, steps=2)

        assert seen, "the files are not mapped any more: this test is without meaning"
        gc.collect()
        assert [name for name in self.mapped() if name.endswith(".pt")] == []


LONG_LISTS = {
    "tensors": lambda n: torch.full((3,), float(n)),
    "tensors of several shapes": lambda n: torch.full((n % 4,), float(n)),
    "transitions": lambda n: (torch.full((2,), float(n)), torch.tensor(n), 0.5 * n, n % 2 == 0),
    "dictionaries": lambda n: {"seen": torch.full((2,), n), "reward": float(n)},
    "rows of several lengths": lambda n: [torch.tensor(n)] * (1 + n % 2),
    "numbers": lambda n: n,
    "two types of tensors": lambda n: torch.zeros(2, dtype=torch.int64 if n % 2 else torch.float32),
}


class TestALongList:
    """A replay buffer, as a program keeps it in Values."""

    @pytest.mark.parametrize("kind", LONG_LISTS)
    def test_comes_back_as_it_was(self, kind, tmp_path):
        make = LONG_LISTS[kind]
        run({"values": Values(buffer=[make(n) for n in range(300)])}, tmp_path)
        back = Values(buffer=[])
        run({"values": back}, tmp_path)

        assert repr(back.buffer) == repr([make(n) for n in range(300)])
        if isinstance(back.buffer[0], torch.Tensor):
            assert all(one.untyped_storage().nbytes() == one.nbytes for one in back.buffer)

    def test_is_not_changed_in_the_snapshot_by_what_the_program_does_next(self):
        buffer = [torch.zeros(2) for _ in range(300)]
        copies = CopyStreams({})
        memory = HostMemory()
        taken = {"buffer": memory.copy("values", buffer, copies)}
        for one in buffer:
            one += 1

        assert sum(float(one.sum()) for one in unpacked(taken)["buffer"]) == 0

    def test_stays_tied_where_a_tensor_is_in_it_twice(self, tmp_path):
        one = torch.ones(2)
        run({"values": Values(buffer=[one] * 300)}, tmp_path)
        back = Values(buffer=[])
        run({"values": back}, tmp_path)

        assert len({id(tensor) for tensor in back.buffer}) == 1

    def test_is_copied_in_one_piece_and_not_tensor_by_tensor(self):
        buffer = [torch.randn(16) for _ in range(20_000)]
        memory = HostMemory()
        with OperationsCounted() as counted:
            memory.copy("values", buffer, CopyStreams({}))

        assert 0 < counted.number < 100
