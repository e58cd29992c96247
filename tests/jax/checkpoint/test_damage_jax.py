"""Every file of the newest checkpoint, flipped and cut, and disks that are full: a restart takes what is good."""

from __future__ import annotations

import errno
import logging
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import optax
import pytest
from saved_states import snapshot

from stepguard import Saving
from stepguard.jax import Supervisor
from stepguard.orbax_files.taken import read_process, write_part
from stepguard.saving.commit import Committer
from stepguard.saving.retry import Backoff
from stepguard.store import CheckpointStore

BEFORE, NEWEST = 3, 6
NAME = f"model.ckpt-{NEWEST}"
ADAM = optax.adam(1e-3)


@jax.jit
def step(state):
    updates, opt = ADAM.update({"w": jnp.ones(100)}, state["opt"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "text": state["text"]}


def train(logdir, steps):
    """Train up to ``steps`` steps; return the step and the weights with which the session began."""
    params = {"w": jnp.ones(100)}
    state = {"params": params, "opt": ADAM.init(params), "text": 3}
    sv = Supervisor(logdir, save_model_secs=0, saving=Saving(save_at_end=True), save_summaries_secs=0)
    with sv.managed_session(state) as session:
        began = session.global_step, session.state["params"]["w"]
        for _ in session.steps(max_steps=steps) if steps else ():
            session.state = step(session.state)
    return began


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A logdir with two checkpoints, and the weights of the older one."""
    logdir = tmp_path_factory.mktemp("original") / "run"
    train(logdir, BEFORE)
    return logdir, train(logdir, NEWEST)[1]


def damages(content: bytes) -> dict[str, bytes]:
    flipped = {place: bytearray(content) for place in (0, len(content) // 2, len(content) - 1)}
    for place, one in flipped.items():
        one[place] ^= 4
    cut = {length: content[:length] for length in (0, len(content) // 2, len(content) - 1)}
    return {f"byte {n}": bytes(one) for n, one in flipped.items()} | {f"cut to {n}": one for n, one in cut.items()}


@pytest.mark.parametrize(
    "file", ["d/process-0", "d/tree", "state.json", "_METADATA", "manifest.ocdbt", "process-0.json"]
)
def test_the_one_before_it_is_taken_and_what_was_lost_is_said(file, original, tmp_path, caplog):
    logdir, weights = original
    for what, content in damages((logdir / NAME / file).read_bytes()).items():
        copy = tmp_path / "run"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(logdir, copy)
        (copy / NAME / file).write_bytes(content)
        caplog.clear()

        began, found = train(copy, 0)

        assert began == BEFORE, what
        assert jnp.array_equal(found, weights), what
        (message,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        assert f"{NAME} is damaged" in message, what
        assert f"{NAME}/{file}" in message, what
        assert f"resuming from {copy}/model.ckpt-{BEFORE}, {NEWEST - BEFORE} steps earlier" in message, what
        assert (copy / "quarantine" / NAME).is_dir(), what


def test_a_whole_copy_is_resumed_from_its_newest_without_a_word(original, tmp_path, caplog):
    shutil.copytree(original[0], tmp_path / "run")

    assert train(tmp_path / "run", 0)[0] == NEWEST
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_process_file_that_the_manifest_does_not_name_is_not_read(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "run")
    path = tmp_path / "run" / NAME
    shutil.copy(path / "process-0.json", path / "process-1.json")

    assert read_process(path, 0) is not None
    assert read_process(path, 1) is None


@pytest.fixture
def small_files(monkeypatch):
    """Writing fails, as on a full disk, after 100,000 bytes of a file."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(nbytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if nbytes is None else nbytes, before[1]))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_raises_the_systems_error(tmp_path, small_files):
    taken = snapshot({"w": jnp.ones(100_000)})
    small_files(100_000)

    with pytest.raises(OSError, match="too large") as caught:
        write_part(tmp_path, 0, taken)

    assert caught.value.errno == errno.EFBIG


def test_a_save_that_found_the_disk_full_is_tried_again_while_training_goes_on(
    tmp_path, small_files, monkeypatch, caplog
):
    monkeypatch.setitem(Backoff.__init__.__kwdefaults__, "first_secs", 0.01)
    monkeypatch.setattr(Committer, "_check_space", lambda *_: None)
    state = {"w": jnp.zeros(100_000)}
    sv = Supervisor(tmp_path, save_model_secs=0.01, save_summaries_secs=0)
    store = CheckpointStore(tmp_path, engine="jax")
    small_files(100_000)  # Before there is a session, whose first checkpoint may be written before its first step.
    with sv.managed_session(state) as session:
        for _ in session.steps():
            session.state = {"w": session.state["w"] + 1}
            if "too large" in caplog.text:
                small_files(None)
            if store.candidates():
                break
    assert "too large" in caplog.text
    newest = store.newest_good().checkpoint
    assert newest is not None
    assert newest.step == session.global_step
