"""Snapshots of arrays that the next step donates, and of those that it leaves."""

from __future__ import annotations

import functools
import gc
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stepguard.jax import Supervisor
from stepguard.jax.checkpoint import snapshot as snapshots
from stepguard.jax.checkpoint.snapshot import Donations, HostMemory, take

SIZE = 1000


def initial(**more):
    return {"first": jnp.zeros(SIZE), "second": jnp.zeros((SIZE, 2)), **more}


def _raised(state):
    return jax.tree.map(lambda array: array + 1, state)


raised = jax.jit(_raised)
donating = functools.partial(jax.jit, donate_argnums=0)(_raised)


@jax.jit
def _half(first, second):
    return first + 1, second + 1


half_donating = functools.partial(jax.jit, donate_argnums=0)(_half)


def addresses(snapshot):
    return [part.data.ctypes.data for part in snapshot.parts]


def values(snapshot):
    snapshot.finish()
    return {float(value) for part in snapshot.parts for value in np.unique(part.data)}


@pytest.fixture
def donations():
    """What is known after two steps that have donated."""
    found = Donations()
    state = initial()
    for _ in range(2):
        state = donating(state)
        found.after_step(state)
    return found


@pytest.mark.parametrize("step", [raised, donating])
@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_every_checkpoint_holds_its_own_step(tmp_path, step, is_on_cpu, monkeypatch):
    """Where no array is on the CPU, arrays are copied on the device, as on an accelerator."""
    monkeypatch.setattr(snapshots, "_is_on_cpu", lambda array: is_on_cpu)
    written = {}
    sv = Supervisor(tmp_path, save_model_steps=1, save_summaries_secs=0)
    write = sv._engine.write

    def writes(snapshot, *arguments):
        written[snapshot.step] = values(snapshot)
        return write(snapshot, *arguments)

    sv._engine.write = writes
    with sv.managed_session(initial()) as session:
        for _ in session.steps(max_steps=8):
            # The first one, of the state before the first step, is taken by a thread of its own.
            while sv._saving.writer.busy or not written:
                time.sleep(0.001)
            session.state = step(session.state)

    assert sorted(written) == list(range(9))
    assert all(found == {float(at)} for at, found in written.items())


def test_an_array_that_is_not_donated_is_not_copied():
    state = initial()

    snapshot = take(state, 1, {}, Donations(), HostMemory())

    assert addresses(snapshot) == [array.unsafe_buffer_pointer() for array in jax.tree.leaves(state)]


def test_a_snapshot_keeps_its_values_where_the_first_step_donates():
    state = initial()
    snapshot = take(state, 1, {}, Donations(), HostMemory())

    for _ in range(3):
        state = donating(state)

    assert values(snapshot) == {0.0}
    assert float(state["first"][0]) == 3.0


def test_two_steps_show_what_is_donated(donations):
    assert donations.names == {"first", "second"}


def test_a_part_that_is_donated_is_told_from_the_rest():
    found = Donations()
    state = initial()
    for _ in range(2):
        first, second = half_donating(state["first"], state["second"])
        state = {"first": first, "second": second}
        found.after_step(state)

    assert found.names == {"first"}


def test_a_donated_array_is_copied_into_the_same_memory_each_time(donations):
    state, memory = donating(initial()), HostMemory()
    first = take(state, 1, {}, donations, memory)
    begins_at = addresses(first)
    assert begins_at != [array.unsafe_buffer_pointer() for array in jax.tree.leaves(state)]
    pointers = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(state)]
    state = donating(state)
    # The step has taken the memory of its argument: the copy does not stand in its way.
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(state)] == pointers
    assert values(first) == {1.0}
    del first
    gc.collect()

    second = take(state, 2, {}, donations, memory)

    assert addresses(second) == begins_at
    assert values(second) == {2.0}


def test_memory_that_a_snapshot_lies_in_is_left_alone(donations):
    state, memory = donating(initial()), HostMemory()
    first = take(state, 1, {}, donations, memory)

    second = take(donating(state), 2, {}, donations, memory)

    assert values(first) == {1.0}
    assert values(second) == {2.0}


def test_shards_of_eight_devices_keep_their_values_where_they_are_donated():
    mesh = jax.make_mesh((8,), ("x",))
    state = jax.device_put(
        {"split": jnp.zeros((8, 4)), "whole": jnp.zeros(3)},
        {"split": NamedSharding(mesh, PartitionSpec("x")), "whole": NamedSharding(mesh, PartitionSpec())},
    )
    state = donating(state)
    snapshot = take(state, 1, {}, Donations(), HostMemory())

    for _ in range(3):
        state = donating(state)

    assert values(snapshot) == {1.0}
    assert [(part.leaf_index, part.bounds) for part in snapshot.parts] == [
        *((0, ((row, row + 1), (0, 4))) for row in range(8)),
        (1, ((0, 3),)),  # written once, and not by each device
    ]
    assert float(state["split"].sum()) == 4 * 32


def test_numpy_arrays_are_copied_because_the_program_may_change_them():
    state = initial(mine=np.zeros(3))
    snapshot = take(state, 1, {}, Donations(), HostMemory())

    state["mine"][:] = 5

    assert values(snapshot) == {0.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "float32", "complex64"])
def test_numbers_that_are_not_finite_are_found_in_every_type(dtype):
    state = {"good": jnp.zeros(3, dtype), "bad": jnp.asarray([0, np.nan, 0], dtype), "number": float("nan"), "n": 1}

    assert take(state, 1, {}, Donations(), HostMemory()).non_finite() == ["bad", "number"]


def test_a_state_that_is_never_assigned_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "stepguard"), Supervisor().managed_session(initial()) as session:
        state = session.state
        for _ in session.steps(max_steps=4):
            state = raised(state)

    (warning,) = [one.message for one in caplog.records if "sess.state" in one.message]
    assert "sess.state, loss = train_step(sess.state, batch)" in warning


def test_a_state_that_is_never_assigned_and_donated_says_what_to_do():
    with (
        pytest.raises(TypeError, match=r"first: .* donated .* assign sess\.state"),
        Supervisor().managed_session(initial()) as session,
    ):
        state = session.state
        for _ in session.steps(max_steps=4):
            state = donating(state)


def test_memory_for_what_is_donated_is_made_as_soon_as_that_is_known(monkeypatch):
    made = []
    with Supervisor().managed_session(initial()) as session:
        empty = np.empty
        monkeypatch.setattr(np, "empty", lambda *arguments: made.append(session.global_step) or empty(*arguments))
        for _ in session.steps(max_steps=4):
            session.state = donating(session.state)
        take(session.state, 4, {}, session.donations, session.memory)

    assert made == [2, 2]  # one for each array, at the end of the second step
