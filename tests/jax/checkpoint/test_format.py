"""Orbax restores a checkpoint without Stepguard, with the structure of the program's state and without."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec
from saved_states import assert_same, save, snapshot

from stepguard.orbax_files import ocdbt
from stepguard.orbax_files.taken import write_part, write_tree

BIG = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)


def sharded(*axes: str | None, shape: tuple[int, ...] = (2, 4)) -> jax.Array:
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)])
    return jax.device_put(BIG, NamedSharding(mesh, PartitionSpec(*axes)))


def arrays():
    return {
        "params": {"dense.kernel": jnp.asarray(BIG), "half": jnp.ones(3, jnp.bfloat16)},
        "eighth": jnp.ones(3, jnp.float8_e4m3fn),
        "int4": jnp.arange(3, dtype=jnp.int4),
        "opt": optax.chain(optax.clip(1.0), optax.adam(1e-3)).init({"w": jnp.ones(2)}),
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(1), 4),
        "numpy": np.arange(5),
        "rows": sharded("a"),
        "blocks": sharded("a", "b"),
        "turned": sharded("b", "a"),
        "whole": sharded(),
        "none": None,
    }


class TestOrbax:
    def test_restores_it_in_the_structure_of_the_state(self, tmp_path):
        state = arrays()

        assert_same(
            ocp.StandardCheckpointer().restore(save(state, tmp_path / "it"), target=state), state, is_orbax=True
        )

    def test_restores_it_onto_another_mesh(self, tmp_path):
        path = save({"w": sharded("a", "b")}, tmp_path / "it")
        target = {"w": jnp.zeros_like(sharded(None, "b", shape=(4, 2)))}

        assert_same(
            ocp.StandardCheckpointer().restore(path, target=target),
            {"w": sharded(None, "b", shape=(4, 2))},
            is_orbax=True,
        )

    def test_restores_it_without_knowing_the_structure(self, tmp_path):
        state = {**arrays(), "n": 7, "x": 0.25, "flag": True, "text": "abc", "z": 1 + 2j, "empty": {}, "list": []}

        found = ocp.StandardCheckpointer().restore(save(state, tmp_path / "it"))

        assert found.keys() == state.keys()
        for name in ("rows", "blocks", "turned", "whole"):
            assert np.array_equal(found[name], BIG), name
        assert np.array_equal(found["params"]["dense.kernel"], BIG)
        assert found["opt"] == [
            None,
            [{"count": 0, "mu": found["opt"][1][0]["mu"], "nu": found["opt"][1][0]["nu"]}, None],
        ]
        assert [found[name] for name in ("n", "x", "flag", "text", "z", "none", "empty", "list")] == [
            *(7, 0.25, True, "abc", 1 + 2j, None, {}, [])
        ]

    def test_tells_its_structure_and_types(self, tmp_path):
        metadata = ocp.StandardCheckpointer().metadata(save(arrays(), tmp_path / "it")).item_metadata.tree

        assert (metadata["params"]["half"].shape, metadata["params"]["half"].dtype) == ((3,), jnp.bfloat16)


class TestTheFilesOfSeveralProcesses:
    def test_are_one_checkpoint(self, tmp_path):
        state = {"w": sharded("a", "b"), "n": jnp.ones(2)}
        both, one, other = snapshot(state), snapshot(state), snapshot(state)
        one.parts, other.parts = both.parts[:3], both.parts[3:]

        write_part(tmp_path, 1, other)
        write_part(tmp_path, 0, one)
        write_tree(tmp_path, one, 2)

        assert {path.name for path in (tmp_path / "d").iterdir()} == {"process-0", "process-1", "tree"}
        assert_same(ocp.StandardCheckpointer().restore(tmp_path, target=state), state, is_orbax=True)

    def test_without_those_of_one_is_none(self, tmp_path):
        taken = snapshot({"w": jnp.ones(2)})
        write_part(tmp_path, 0, taken)

        with pytest.raises(FileNotFoundError, match=r"parts-1\.json"):
            write_tree(tmp_path, taken, 2)


class TestTheIndex:
    def test_finds_each_of_many_keys(self, tmp_path):
        values = {f"layers.{n}/0": n.to_bytes(2, "big") * 200 for n in range(3000)}
        node = ocdbt.node(values)
        (tmp_path / "tree").write_bytes(node)
        (tmp_path / ocdbt.MANIFEST).write_bytes(ocdbt.manifest(ocdbt.Place("tree", 0, len(node)), values))

        found = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()

        assert [one.decode() for one in found.list().result()] == sorted(values)
        assert all(found.read(key).result().value == values[key] for key in list(values)[::100])

    def test_has_its_small_files_whatever_the_number_of_arrays(self, tmp_path):
        path = save({f"w{n}": jnp.ones(3) for n in range(100)}, tmp_path / "it")

        assert len([one for one in path.rglob("*") if one.is_file()]) == 6
        assert len(json.loads((path / "state.json").read_bytes())["leaves"]) == 100
