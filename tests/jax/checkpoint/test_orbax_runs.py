"""Checkpoints that Orbax has written: a run of its CheckpointManager goes on, and weights are taken from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from saved_states import assert_same, restore

from stepguard import Saving
from stepguard.errors import CheckpointCorruptError, CheckpointMismatchError
from stepguard.jax import Supervisor
from stepguard.jax.checkpoint.restore import first_values
from stepguard.options import Restoring


def state(seed):
    rows = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    whole = np.random.default_rng(seed).standard_normal((16, 4)).astype("f")
    return {
        "params": {"w": jnp.asarray(whole), "half": jnp.full(3, seed, jnp.bfloat16), "a.b": jnp.ones(1) * seed},
        "opt": optax.adam(1e-3).init({"w": jnp.full(2, seed, "f")}),
        "rows": jax.device_put(whole, rows),
        "key": jax.random.key(seed),
        "numpy": np.arange(seed),
        "n": seed,
        "x": seed / 4,
        "flag": True,
        "text": "text",
        "none": None,
    }


FORMS = {
    "default": {},
    "compressed files": {"use_ocdbt": False},
    "plain files": {"use_ocdbt": False, "use_compression": False},
    "zarr3": {"use_zarr3": True},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form_is_read(form, tmp_path):
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**form)).save(tmp_path / "it", args=ocp.args.PyTreeSave(state(4)))

    own = {**state(1), "numpy": np.arange(4)}
    assert_same(restore(tmp_path / "it", own), state(4))


def saved_run(root: Path, *steps: int, **options) -> None:
    with ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(**options)) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.StandardSave({"w": jnp.full(3, step, "f")}))
            manager.wait_until_finished()


def go_on(root: Path, steps: int) -> tuple[int, float]:
    """Train ``steps`` steps; returns the step and the weight with which the session began."""
    sv = Supervisor(root, save_model_secs=0, saving=Saving(save_at_end=True), save_summaries_secs=0)
    with sv.managed_session({"w": jnp.zeros(3)}) as session:
        began = session.global_step, float(session.state["w"][0])
        for _ in session.steps(max_steps=began[0] + steps):
            session.state = {"w": session.state["w"] + 1}
    return began


class TestARunOfOrbaxs:
    def test_goes_on_from_its_newest_step_and_then_from_our_own(self, tmp_path, caplog):
        saved_run(tmp_path, 100, 200)

        assert go_on(tmp_path, 5) == (200, 200)
        assert "going on at step 200" in caplog.text
        assert "Orbax" in caplog.text
        assert go_on(tmp_path, 5) == (205, 205)
        assert (tmp_path / "100").is_dir()

    def test_goes_on_where_orbax_was_last(self, tmp_path):
        saved_run(tmp_path, 100)
        go_on(tmp_path, 5)
        saved_run(tmp_path, 300)

        assert go_on(tmp_path, 5) == (300, 300)

    def test_with_named_steps_goes_on(self, tmp_path):
        saved_run(tmp_path, 7, step_prefix="ckpt")

        assert go_on(tmp_path, 1) == (7, 7)

    def test_with_a_damaged_newest_step_goes_on_from_the_one_before(self, tmp_path, caplog):
        saved_run(tmp_path, 100, 200)
        for path in (tmp_path / "200").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:20])

        assert go_on(tmp_path, 5) == (100, 100)
        assert "200, which Orbax has written, is passed over" in caplog.text

    def test_ignores_steps_that_are_not_finished(self, tmp_path):
        saved_run(tmp_path, 100)
        shutil.copytree(tmp_path / "100", tmp_path / "200.orbax-checkpoint-tmp")

        assert go_on(tmp_path, 1) == (100, 100)

    def test_of_another_model_is_refused(self, tmp_path):
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(3, args=ocp.args.StandardSave({"w": jnp.zeros(5)}))

        with pytest.raises(CheckpointMismatchError, match=r"w \(expected float32\[3\], found float32\[5\]\)"):
            go_on(tmp_path, 1)


class TestItems:
    def saved(self, root):
        with ocp.CheckpointManager(root) as manager:
            items = {"params": {"w": jnp.ones(3)}, "opt": [jnp.ones(1)]}
            manager.save(3, args=ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in items.items()}))
        return root / "3"

    def test_are_parts_of_one_state(self, tmp_path):
        found = restore(self.saved(tmp_path), {"params": {"w": jnp.zeros(3)}, "opt": [jnp.zeros(1)]})

        assert_same(found, {"params": {"w": jnp.ones(3)}, "opt": [jnp.ones(1)]})

    def test_give_weights(self, tmp_path):
        self.saved(tmp_path)
        own = {"params": {"w": jnp.zeros(3)}, "new": jnp.zeros(1)}

        assert_same(
            first_values(own, Restoring(init_from=tmp_path)), {"params": {"w": jnp.ones(3)}, "new": jnp.zeros(1)}
        )


class TestARunOfStepguards:
    def trained(self, root, steps, **saving):
        saving = Saving(save_at_end=True, **saving)
        sv = Supervisor(root, save_model_secs=0, save_model_steps=1, saving=saving, save_summaries_secs=0)
        with sv.managed_session({"params": {"w": jnp.zeros(3)}, "opt": jnp.zeros(2)}) as session:
            for _ in session.steps(max_steps=steps):
                session.state = {**session.state, "params": {"w": session.state["params"]["w"] + 1}}

    def test_gives_the_weights_of_its_newest_checkpoint(self, tmp_path):
        self.trained(tmp_path, 2)
        own = {"params": {"w": jnp.zeros(3)}, "new": jnp.zeros(1)}

        for place in (tmp_path, {"params": tmp_path}, tmp_path / "model.ckpt-2"):
            found = first_values(own, Restoring(init_from=place))
            assert_same(found, {"params": {"w": jnp.ones(3) * 2}, "new": jnp.zeros(1)})

    def test_of_another_basename_is_not_taken_for_one_checkpoint(self, tmp_path):
        self.trained(tmp_path, 2, checkpoint_basename="other")
        own = {"params": {"w": jnp.zeros(3)}}

        with pytest.raises(FileNotFoundError, match=r"called model\.ckpt-STEP; for others give the path of one"):
            first_values(own, Restoring(init_from=tmp_path))
        found = first_values(own, Restoring(init_from=tmp_path / "other-2"))
        assert_same(found, {"params": {"w": jnp.ones(3) * 2}})


@pytest.mark.parametrize("content", [b"", b"[]", b'{"tree_metadata": {"__import__(\'os\')": {}}}', b"[" * 100_000])
def test_metadata_of_another_form_is_damage(content, tmp_path):
    (tmp_path / "_METADATA").write_bytes(content)

    with pytest.raises(CheckpointCorruptError, match="_METADATA"):
        restore(tmp_path, {"w": jnp.zeros(1)})
