"""``stepguard export``: the weights of checkpoints of each engine, as other tools read them."""

import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from crafted import sign
from logdirs import commit, flip

from stepguard.cli.exits import CommandError
from stepguard.cli.logdir import weight_files
from stepguard.store.saved_tensor import SavedWeight

safetensors = pytest.importorskip("safetensors.numpy")


@pytest.fixture(scope="module")
def model_run(tmp_path_factory):
    """A logdir of PyTorch with the steps 1 and 2; the model has tied weights, bfloat16 and frozen parameters."""
    torch = pytest.importorskip("torch")
    from stepguard.options import Saving
    from stepguard.torch import Supervisor

    torch.manual_seed(1)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2), "c": torch.nn.BatchNorm1d(2)})
    model["b"].weight = model["a"].weight
    model["c"].to(torch.bfloat16).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    logdir = tmp_path_factory.mktemp("model")
    saving = Saving(save_model_secs=0, save_model_steps=1, frozen_apart=True, keep_best=("loss", "min", 1))
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir, saving=saving)
    with sv.managed_session() as session:
        for step in session.steps(max_steps=2):
            model["a"](torch.ones(1, 3)).sum().backward()
            optimizer.step()
            session.metrics({"loss": float(step)})
    return logdir


def of_step(logdir, step):
    from stepguard.torch import load

    return load(logdir, step)["model"]


class TestPyTorch:
    def test_a_state_dict_is_what_torch_loads(self, model_run, stepguard, tmp_path):
        import torch

        done = stepguard("export", model_run, tmp_path / "out.pt", "--weights")
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith(f"{tmp_path / 'out.pt'}: 9 tensors of model of step 2, ")
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        saved = of_step(model_run, 2)
        assert list(found) == list(saved)
        for name, tensor in saved.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
        assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()
        assert os.listdir(tmp_path) == ["out.pt"]

    def test_safetensors_has_a_tied_tensor_under_each_name(self, model_run, stepguard, tmp_path):
        import torch
        from safetensors.torch import load_file

        assert stepguard("export", model_run, tmp_path / "out.safetensors", "--weights").exit_code == 0
        found = load_file(tmp_path / "out.safetensors")
        for name, tensor in of_step(model_run, 2).items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found.pop(name), tensor), name
        assert not found

    def test_npz_has_no_room_for_bfloat16_and_says_so(self, model_run, stepguard, tmp_path):
        done = stepguard("export", model_run, tmp_path / "out.npz", "--weights")
        assert done.exit_code == 3
        assert "c.weight is of the type bfloat16, which a file .npz has no room for" in done.stderr
        assert not os.listdir(tmp_path)

    def test_the_checkpoint_is_chosen_by_step_best_or_path(self, model_run, stepguard, document, tmp_path):
        for arguments, step in (
            ((model_run, "--step", "1"), 1),
            ((model_run, "--step", "best"), 1),
            ((model_run / "model.ckpt-1",), 1),
            ((model_run,), 2),
        ):
            place, *options = arguments
            out = tmp_path / "out.pt"
            assert document("export", place, out, "--weights", "--overwrite", *options)["step"] == step
        assert stepguard("export", model_run, out, "--weights", "--overwrite", "--step", "7").exit_code == 1
        wrong = stepguard("export", model_run / "model.ckpt-1", out, "--weights", "--overwrite", "--step", "1")
        assert wrong.exit_code == 2

    def test_a_part_without_weights_is_named_with_those_that_have_some(self, model_run, stepguard, tmp_path):
        done = stepguard("export", model_run, tmp_path / "out.pt", "--weights", "--part", "optimizer")
        assert done.exit_code == 1
        assert "expected a part 'optimizer' with weights, found model" in done.stderr

    def test_a_mirror_is_read_as_a_logdir_is(self, model_run, stepguard, tmp_path):
        url = (tmp_path / "mirror").as_uri()
        assert stepguard("push", model_run, url).exit_code == 0
        done = stepguard("export", url, tmp_path / "out.pt", "--weights", "--step", "2")
        assert done.exit_code == 0, done.output
        assert (tmp_path / "out.pt").stat().st_size > 1000

    def test_a_sparse_tensor_is_refused_in_its_part_alone(self, stepguard, tmp_path):
        torch = pytest.importorskip("torch")
        from stepguard.options import Saving
        from stepguard.torch import Supervisor

        model = torch.nn.Linear(2, 2)
        model.register_buffer("graph", torch.eye(3).to_sparse())
        sv = Supervisor(
            {"model": model, "head": torch.nn.Linear(2, 2)},
            tmp_path / "run",
            saving=Saving(save_model_secs=0, save_at_end=True),
        )
        with sv.managed_session() as session:
            for _ in session.steps(max_steps=1):
                pass
        out = tmp_path / "out.pt"
        done = stepguard("export", tmp_path / "run", out, "--weights")
        assert done.exit_code == 3
        assert "graph is of the type sparse float32, which a file .pt has no room for" in done.stderr
        assert stepguard("export", tmp_path / "run", out, "--weights", "--part", "head").exit_code == 0
        assert list(torch.load(out, weights_only=True)) == ["weight", "bias"]

    # What PyTorch says of such tensors when they are made and read.
    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
    @pytest.mark.parametrize(
        ("kind", "make"),
        [
            ("meta float32", lambda torch: torch.empty(2, 3, device="meta")),
            ("qint8", lambda torch: torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8)),
            (
                "qint8",
                lambda torch: torch.quantize_per_channel(
                    torch.rand(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8
                ),
            ),
            ("sparse float32", lambda torch: torch.eye(3).to_sparse_csr()),
            ("nested float32", lambda torch: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        ],
        ids=["meta", "quantized", "by channel", "sparse", "nested"],
    )
    def test_what_no_file_has_room_for_is_named_with_its_type(self, kind, make, suffix, model_run, stepguard, tmp_path):
        torch = pytest.importorskip("torch")
        logdir = shutil.copytree(model_run, tmp_path / "run")
        torch.save({"weight": make(torch), "bias": torch.ones(2)}, logdir / "model.ckpt-2" / "optimizer.pt")
        sign(logdir, "model.ckpt-2")
        done = stepguard("export", logdir, tmp_path / f"out{suffix}", "--weights", "--part", "optimizer")
        assert done.exit_code == 3
        assert f"weight is of the type {kind}, which a file {suffix} has no room for" in done.stderr
        assert not list(tmp_path.glob("*out*"))


class TestAFile:
    def test_that_exists_is_replaced_only_when_asked(self, model_run, stepguard, tmp_path):
        out = tmp_path / "out.pt"
        out.write_bytes(b"precious")
        done = stepguard("export", model_run, out, "--weights")
        assert done.exit_code == 1
        assert "--overwrite" in done.stderr
        assert out.read_bytes() == b"precious"
        assert stepguard("export", model_run, out, "--weights", "--overwrite").exit_code == 0
        assert out.read_bytes() != b"precious"

    @pytest.mark.parametrize("name", ["model.ckpt-2/model.pt", "model.ckpt-2/frozen/model.pt"])
    def test_is_not_written_from_a_damaged_checkpoint(self, name, model_run, stepguard, tmp_path):
        logdir = shutil.copytree(model_run, tmp_path / "run")
        flip(logdir / name)
        done = stepguard("export", logdir, tmp_path / "out.pt", "--weights")
        assert done.exit_code == 1
        assert "damaged, so nothing was exported" in done.stderr
        assert name in done.stderr
        assert os.listdir(tmp_path) == ["run"]

    def test_is_left_as_it_was_when_the_disk_fails(self, model_run, stepguard, tmp_path, monkeypatch):
        out = tmp_path / "out.safetensors"
        out.write_bytes(b"precious")

        def fails(path):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr("stepguard.cli.logdir.weight_files.files.fsync_file", fails)
        done = stepguard("export", model_run, out, "--weights", "--overwrite")
        assert done.exit_code == 3
        assert "No space left" in done.stderr
        assert (out.read_bytes(), os.listdir(tmp_path)) == (b"precious", [out.name])

    @pytest.mark.parametrize("arguments", [["out.pt"], ["out.h5", "--weights"], ["out", "--weights"]])
    def test_of_another_kind_is_a_mistake_in_the_arguments(self, arguments, model_run, stepguard, tmp_path):
        out, *options = arguments
        assert stepguard("export", model_run, tmp_path / out, *options).exit_code == 2
        assert not os.listdir(tmp_path)

    def test_alone_is_no_checkpoint(self, model_run, stepguard, tmp_path):
        single = model_run / "model.ckpt-2" / "model.pt"
        done = stepguard("export", single, tmp_path / "out.npz", "--weights")
        assert done.exit_code == 2
        assert "found a single file" in done.stderr


class TestJAX:
    def test_the_parts_are_exported_with_their_types(self, jax_run, stepguard, tmp_path):
        out = tmp_path / "params.npz"
        assert stepguard("export", jax_run, out, "--weights").exit_code == 0
        with np.load(out) as found:
            assert dict(found).keys() == {"0"}
            assert (found["0"] == np.full(3, 4, np.float32)).all()

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_pytorch_reads_them_with_the_types_that_numpy_has_not(self, suffix, jax_run, stepguard, tmp_path):
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file

        out = tmp_path / f"kinds{suffix}"
        assert stepguard("export", jax_run, out, "--weights", "--part", "kinds").exit_code == 0
        found = torch.load(out, weights_only=True) if suffix == ".pt" else load_file(out)
        assert (found["half"].dtype, found["half"].tolist()) == (torch.bfloat16, [1.5, -2.5])
        assert (found["eighth"].dtype, found["eighth"].tolist()) == (torch.float8_e4m3fn, [0.5, -1.0])
        assert found["flags"].tolist() == [True, False]
        assert found["wave"].tolist() == [3 + 4j]
        assert found["nothing"].shape == (0, 3)

    def test_two_parts_and_no_usual_name_ask_which(self, jax_run, stepguard, tmp_path):
        done = stepguard("export", jax_run, tmp_path / "out.npz", "--weights", "--part", "nothing")
        assert done.exit_code == 1
        assert "found key, kinds, params" in done.stderr


def test_tensorflow_exports_variables_without_those_of_the_optimizer(stepguard, tmp_path):
    tf = pytest.importorskip("tensorflow")
    from stepguard.options import Saving
    from stepguard.tensorflow import Supervisor

    v1 = tf.compat.v1
    logdir = tmp_path / "run"
    with tf.Graph().as_default():
        step = v1.train.get_or_create_global_step()
        with v1.variable_scope("dense"):
            kernel = v1.get_variable("kernel", initializer=tf.constant([1.0, 2.0]))
        with v1.variable_scope("model"):
            bias = v1.get_variable("bias", initializer=tf.constant([3.0]))
        half = v1.get_variable("half", initializer=tf.constant([1.5], tf.bfloat16), trainable=False)
        train = v1.train.AdamOptimizer().minimize(tf.reduce_sum(kernel * kernel) + bias[0], global_step=step)
        saving = Saving(save_model_secs=0, save_at_end=True)
        sv = Supervisor(logdir=str(logdir), saving=saving, summary_op=None, save_summaries_secs=0)
        with sv.managed_session() as sess:
            sess.run(train)
            expected = sess.run(kernel)
    out = tmp_path / "out.safetensors"
    assert stepguard("export", logdir, out, "--weights").exit_code == 0
    found = safetensors.load_file(out)
    # The whole model, although a scope has the same name.
    assert found.keys() == {"dense/kernel", "model/bias", half.op.name}
    assert (found["dense/kernel"] == expected).all()
    assert found["half"].view(ml_dtypes.bfloat16).tolist() == [1.5]
    scoped = tmp_path / "dense.npz"
    assert stepguard("export", logdir, scoped, "--weights", "--part", "dense").exit_code == 0
    with np.load(scoped) as arrays:
        assert {"dense/kernel", "dense/kernel/Adam"} <= set(arrays)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_two_tensors_of_one_name_are_refused(suffix, tmp_path):
    def weight():
        return SavedWeight("a", "uint8", (1,), 1, lambda: np.ones(1, np.uint8), "a")

    with pytest.raises(CommandError, match="two tensors have the name 'a'") as found:
        weight_files.write(tmp_path / f"out{suffix}", [weight(), weight()])
    assert found.value.exit_code == 3
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", ["int4", "qint8", "Tensor"])
def test_a_type_that_pytorch_names_and_cannot_save_is_refused(dtype, tmp_path):
    pytest.importorskip("torch")
    weight = SavedWeight("a", dtype, (4,), 4, lambda: np.zeros(4, np.uint8), "a")
    with pytest.raises(CommandError, match=f"a is of the type {dtype}, which a file .pt has no room for"):
        weight_files.write(tmp_path / "out.pt", [weight])
    assert not os.listdir(tmp_path)


def test_without_its_framework_a_checkpoint_is_not_exported(stepguard, tmp_path, monkeypatch):
    commit(tmp_path, 1, saver_files=None)
    monkeypatch.setitem(__import__("sys").modules, "stepguard.torch.checkpoint.weights", None)
    done = stepguard("export", tmp_path, tmp_path / "out.npz", "--weights")
    assert done.exit_code == 3
    assert "pip install 'stepguard[torch]'" in done.stderr
