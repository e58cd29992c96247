"""A state comes back as the run had it, in the form of the program's own, or with the reasons why it cannot."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any, NamedTuple

import equinox
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from saved_states import assert_same, restore, save

from stepguard.errors import CheckpointCorruptError, CheckpointMismatchError
from stepguard.jax.checkpoint.restore import first_values
from stepguard.jax.checkpoint.tree import flatten
from stepguard.options import Restoring
from stepguard.orbax_files.taken import read_process
from stepguard.steps.random_streams import RandomStreams


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    values: Any
    rate: float = dataclasses.field(metadata={"static": True})


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


def numbers(seed, shape=(4, 3)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mlp(seed):
    return equinox.nn.MLP(2, 3, 4, 1, key=jax.random.key(seed))


def everything(seed: int) -> dict[str, Any]:
    params = {"w": numbers(seed), "b": numbers(seed, (3,)).astype(jnp.bfloat16)}
    mesh = jax.make_mesh((8,), ("x",))
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "pair": Pair([numbers(seed, ()), (numbers(seed), None)], {}),
        "record": Record(numbers(seed), 0.5),
        "flax": TrainState.create(apply_fn=print, params={"w": numbers(seed)}, tx=optax.sgd(0.1)),
        "equinox": mlp(seed),
        "key": jax.random.key(seed),
        "rbg": jax.random.key(seed, impl="rbg"),
        "keys": jax.random.split(jax.random.key(seed), 4),
        "old key": jax.random.PRNGKey(seed),
        "eighth": numbers(seed).astype(jnp.float8_e5m2),
        "int4": jnp.full(3, seed % 8, jnp.int4),
        "bool": jnp.asarray([seed % 2 == 0, True]),
        "complex": numbers(seed) * 1j,
        "no rows": jnp.zeros((0, 3)),
        "weak": jnp.asarray(seed),
        "weak float": jnp.asarray(seed / 2),
        "numpy": np.arange(seed, seed + 5),
        "swapped": np.arange(seed, seed + 5, dtype=">f8"),
        "half": np.full(3, seed, ml_dtypes.bfloat16),
        "scalar": np.asarray(seed),
        "python": [seed, seed / 3, seed % 2 == 0, f"text {seed}", complex(seed, 1), -(2**63), float("-inf")],
        "rows": jax.device_put(numbers(seed, (16, 3)), NamedSharding(mesh, PartitionSpec("x"))),
        "everywhere": jax.device_put(numbers(seed, (16, 3)), NamedSharding(mesh, PartitionSpec())),
        "bound": jax.device_put(numbers(seed), jax.devices()[3]),
    }


class TestAState:
    def test_of_all_kinds_comes_back_as_it_was(self, tmp_path, caplog):
        saved = everything(4)

        assert_same(restore(save(saved, tmp_path / "it"), everything(1)), saved)
        assert not caplog.records

    def test_is_that_of_the_run_where_a_step_has_made_arrays_of_numbers(self, tmp_path):
        saved = {"step": jax.jit(lambda n: n + 1)(2), "host": np.ones(2)}

        assert_same(restore(save(saved, tmp_path / "it"), {"step": 0, "host": jnp.zeros(2)}), saved)

    def test_of_nnx_goes_into_the_objects_of_the_program(self, tmp_path):
        def made(seed):
            network = Network(nnx.Rngs(seed))
            return {"model": network, "opt": nnx.Optimizer(network, optax.adam(1e-3), wrt=nnx.Param)}

        saved, own = made(1), made(2)
        network, kernel = own["model"], own["model"].inner.kernel
        found = restore(save(saved, tmp_path / "it"), own)

        assert found["model"] is network
        assert network.inner.kernel is kernel
        assert_same(nnx.state(found["model"]), nnx.state(saved["model"]))
        assert_same(nnx.state(found["opt"]), nnx.state(saved["opt"]))

    def test_is_no_longer_bound_to_the_memory_of_the_files(self, tmp_path):
        found = restore(save({"w": jnp.ones(1000)}, tmp_path / "it"), {"w": jnp.zeros(1000)})
        raised = jax.jit(lambda w: w + 1, donate_argnums=0)

        assert float(raised(raised(found["w"])).sum()) == 3000


class TestOnAnotherMesh:
    @pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 2)])
    @pytest.mark.parametrize("axes", [("a", "b"), (None, "a"), ()])
    def test_each_device_gets_its_part(self, tmp_path, shape, axes):
        whole = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
        before = NamedSharding(jax.make_mesh((4, 2), ("a", "b")), PartitionSpec("b", "a"))
        after = NamedSharding(jax.make_mesh(shape, ("a", "b")), PartitionSpec(*axes))
        path = save({"w": jax.device_put(whole, before)}, tmp_path / "it")

        assert_same(restore(path, {"w": jax.device_put(whole * 0, after)}), {"w": jax.device_put(whole, after)})

    def test_a_device_reads_no_more_than_its_rows(self, tmp_path, monkeypatch):
        sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
        path = save({"w": numbers(1, (64, 1000))}, tmp_path / "it")
        read = []
        from stepguard.orbax_files import reading

        read_at = reading._read_at
        monkeypatch.setattr(
            reading, "_read_at", lambda path, offset, into: (read.append(into.nbytes), read_at(path, offset, into))
        )
        restore(path, {"w": jax.device_put(numbers(2, (64, 1000)), sharding)})

        assert read == [8 * 1000 * 4] * 8


class TestAnotherProgram:
    def test_is_told_all_differences_by_name(self, tmp_path):
        saved = {"params": {"a": jnp.ones(2), "gone": jnp.ones(1), "k": jax.random.key(0)}, "n": 3, "s": "x"}
        path = save(saved, tmp_path / "it")
        own = {"params": {"a": jnp.ones(3), "new": jnp.ones(1), "k": jax.random.key(0, impl="rbg")}, "n": "x", "s": 1}

        with pytest.raises(CheckpointMismatchError) as caught:
            restore(path, own)

        error = caught.value
        assert (error.missing, error.unexpected) == (("params.new",), ("params.gone",))
        assert error.reshaped == {
            "n": ("str", "int"),
            "s": ("int", "str"),
            "params.a": ("float32[3]", "float32[2]"),
            "params.k": ("key<rbg>[]", "key<threefry2x32>[]"),
        }
        assert str(path) in str(error)

    def test_with_integers_in_place_of_floats_is_refused(self, tmp_path):
        path = save({"w": jnp.ones(2)}, tmp_path / "it")

        with pytest.raises(CheckpointMismatchError, match=r"w \(expected int32\[2\], found float32\[2\]\)"):
            restore(path, {"w": jnp.ones(2, int)})

    def test_with_other_floats_is_restored_with_a_warning(self, tmp_path, caplog):
        found = restore(save({"w": jnp.ones(2)}, tmp_path / "it"), {"w": jnp.zeros(2, jnp.bfloat16)})

        assert_same(found, {"w": jnp.ones(2, jnp.bfloat16)})
        assert "w (float32[2] in the checkpoint, bfloat16[2] in the program)" in caplog.text

    def test_with_a_new_part_begins_that_part_anew_with_a_warning(self, tmp_path, caplog):
        path = save({"params": jnp.ones(2)}, tmp_path / "it")

        assert_same(
            restore(path, {"params": jnp.zeros(2), "ema": jnp.ones(2)}), {"params": jnp.ones(2), "ema": jnp.ones(2)}
        )
        assert "as the program has made them begin ema" in caplog.text

    def test_with_a_renamed_part_is_refused(self, tmp_path):
        path = save({"params": jnp.ones(2), "opt": jnp.ones(1)}, tmp_path / "it")

        with pytest.raises(CheckpointMismatchError, match="the program has optimizer, and the checkpoint does not"):
            restore(path, {"params": jnp.ones(2), "optimizer": jnp.ones(1)})

    def test_with_other_static_parts_uses_its_own_with_a_warning_that_has_both(self, tmp_path, caplog):
        def state(rate, activation):
            module = equinox.nn.MLP(2, 3, 4, 1, activation, key=jax.random.key(0))
            return {"model": module, "record": Record(jnp.ones(1), rate)}

        found = restore(save(state(0.5, jax.nn.relu), tmp_path / "it"), state(0.25, jax.nn.gelu))

        assert found["record"].rate == 0.25
        assert found["model"].activation is jax.nn.gelu
        assert "record ((0.5) in the checkpoint, (0.25) in the program)" in caplog.text
        assert "model.activation" in caplog.text
        assert "relu" in caplog.text

    def test_with_the_same_static_parts_gets_no_warning(self, tmp_path, caplog):
        def state():
            return {
                "model": mlp(0),
                "flax": TrainState.create(apply_fn=print, params={}, tx=optax.adam(optax.constant_schedule(1))),
            }

        restore(save(state(), tmp_path / "it"), state())

        assert not caplog.records


class TestOptions:
    def saved(self, tmp_path):
        return save({"params": {"body": jnp.ones(2), "head": jnp.ones(3)}, "opt": [jnp.ones(1)]}, tmp_path / "it")

    def own(self, head=3):
        return {"params": {"body": jnp.zeros(2), "head": jnp.zeros(head)}, "opt": [jnp.zeros(1)]}

    def test_only_restores_some_parts(self, tmp_path, caplog):
        found = restore(self.saved(tmp_path), self.own(), only=["params"])

        assert_same(found, {"params": {"body": jnp.ones(2), "head": jnp.ones(3)}, "opt": [jnp.zeros(1)]})
        assert "begin opt" in caplog.text

    def test_leave_out_restores_some_arrays(self, tmp_path):
        found = restore(self.saved(tmp_path), self.own(head=5), leave_out=["params.head", "opt[0]"])

        assert_same(found, {"params": {"body": jnp.ones(2), "head": jnp.zeros(5)}, "opt": [jnp.zeros(1)]})

    @pytest.mark.parametrize(
        ("option", "known"), [("leave_out", ["params.head", "opt.0", "opt[0]"]), ("only", ["par*"])]
    )
    def test_names_of_nothing_are_told_of(self, option, known, tmp_path, caplog):
        restore(self.saved(tmp_path), self.own(), **{option: known})
        assert f"Restoring({option}=...)" not in caplog.text
        restore(tmp_path / "it", self.own(), **{option: [*known, "head"]})
        assert "found 'head', which match nothing" in caplog.text

    def test_init_from_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"init_from: .* found none at .*nowhere"):
            first_values(self.own(), Restoring(init_from=tmp_path / "nowhere"))

    @pytest.mark.parametrize("of_part", [True, False])
    def test_init_from_takes_weights_and_nothing_else(self, tmp_path, of_part):
        path = self.saved(tmp_path)
        found = first_values(self.own(), Restoring(init_from={"params": path} if of_part else path))

        assert_same(found, {"params": {"body": jnp.ones(2), "head": jnp.ones(3)}, "opt": [jnp.zeros(1)]})

    def test_init_from_a_checkpoint_of_that_part_alone(self, tmp_path):
        path = save({"body": jnp.ones(2), "head": jnp.ones(3)}, tmp_path / "it")

        assert float(first_values(self.own(), Restoring(init_from={"params": path}))["params"]["body"].sum()) == 2

    def test_init_fit_part_takes_what_fits(self, tmp_path, caplog):
        caplog.set_level(logging.WARNING)
        options = Restoring(init_from=self.saved(tmp_path), init_fit="part")

        found = first_values(self.own(head=5), options)

        assert_same(found["params"], {"body": jnp.ones(2), "head": jnp.zeros(5)})
        assert "params.head" in caplog.text

    def test_init_from_that_does_not_fit_is_refused(self, tmp_path):
        with pytest.raises(CheckpointMismatchError, match=r"params\.head"):
            first_values(self.own(head=5), Restoring(init_from=self.saved(tmp_path)))


class TestWhatCannotBeSaved:
    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (np.array(["a"]), "numbers"),
            (2**63, "64 bits"),
            (b"bytes", "a bytes"),
            (np.random.default_rng(0), "a Generator"),
        ],
    )
    def test_is_named(self, value, reason):
        with pytest.raises(TypeError, match=rf"^params\.w\[1\]: .*{reason}"):
            flatten({"params": {"w": [0, value]}})

    def test_a_donated_array_is_named(self):
        state = {"w": jnp.ones(2)}
        jax.jit(lambda s: s, donate_argnums=0)(state)

        with pytest.raises(TypeError, match=r"w: this array was donated.*sess\.state"):
            flatten(state)

    def test_two_values_of_one_name_are_refused(self):
        with pytest.raises(ValueError, match=r"two values named a\.b"):
            flatten({"a": {"b": 1}, "a.b": 2})


class TestFilesThatLie:
    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "O"},
            {"dtype": "|V8"},
            {"dtype": "finfo"},
            {"shape": [-1]},
            {"shape": [3]},
            {"parts": [["../x", [[0, 2]], 0]]},
            {"parts": [[0, [[0, 9]], 0]]},
            {"parts": [[0, [[0, 2]], -4]]},
            {"parts": [[0, [[0, 2]], 10**6]]},
            {"parts": [[0, [[0, 1]], 0]]},
            {"shape": [2**60], "parts": [[0, [[0, 2**60]], 0]]},
            {"shape": [2**62, 2**62], "parts": []},
            {"kind": "object"},
            {"keys": [["w"]]},
        ],
    )
    def test_are_damaged(self, tmp_path, change):
        path = save({"w": jnp.ones(2)}, tmp_path / "it")
        document = json.loads((path / "state.json").read_bytes())
        document["leaves"][0].update(change)
        (path / "state.json").write_text(json.dumps(document))

        with pytest.raises(CheckpointCorruptError):
            restore(path, {"w": jnp.zeros(3 if change == {"shape": [3]} else 2)})

    @pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"leaves": 3}', b"[" * 100_000])
    def test_of_another_form_are_damaged(self, tmp_path, content):
        path = save({"w": jnp.ones(2)}, tmp_path / "it")
        (path / "state.json").write_bytes(content)

        with pytest.raises(CheckpointCorruptError, match=r"state\.json"):
            restore(path, {"w": 0.0})

    @pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"a": {"%array": ["O", [1], ""]}}', b"[" * 100_000])
    def test_of_a_process_are_damaged(self, tmp_path, content):
        (tmp_path / "process-0.json").write_bytes(content)

        with pytest.raises(CheckpointCorruptError, match=r"process-0\.json"):
            read_process(tmp_path, 0)


def test_the_state_of_a_process_comes_back(tmp_path):
    process = {
        "global_step": 3,
        "random": RandomStreams().capture(),
        "loaders": [],
        "tuple": (1, (2, "x")),
        "bytes": b"\0\xff",
        "array": np.arange(6.0).reshape(2, 3),
        3: float("inf"),
        "big": 2**70,
    }
    found = read_process(save({}, tmp_path / "it", process), 0)

    assert found is not None
    assert np.array_equal(found.pop("array"), process.pop("array"))
    assert found == process
    assert read_process(tmp_path / "it", 1) is None
