"""Host memory for snapshots: made and touched before the first step, and reused."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from stepguard.torch import Supervisor
from stepguard.torch.checkpoint.arena import Arena, coming_bytes

WIDTH = 1024  # A layer of four megabytes.


def faults_of(snapshot) -> int:
    """How often the process got a page that it had not had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = snapshot()
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del kept
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux does")
def test_the_first_snapshot_needs_no_memory_that_was_never_touched(tmp_path):
    model = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    sv = Supervisor({"model": model, "optimizer": optimizer}, tmp_path, save_model_steps=1000)
    faults = []
    with sv.managed_session() as sess:
        for _ in sess.steps(max_steps=1):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            optimizer.zero_grad()
            # The first checkpoint, of the model as it was built, gives its memory back.
            sv._saving.writer.drain(60)
            sv._saving.checkpointer._copy = None
            faults.append(faults_of(lambda: sv._engine.snapshot(sess)))

    assert faults[0] < 3 * model.weight.nbytes / resource.getpagesize() / 20


def test_room_is_made_for_the_state_that_an_optimizer_will_have():
    model = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    made = {}
    for optimizer in (
        torch.optim.AdamW(model.parameters(), amsgrad=True),
        torch.optim.SGD(model.parameters(), momentum=0.9),
        torch.optim.SGD(model.parameters()),
        torch.optim.RMSprop(model.parameters()),
    ):
        model.weight.grad = torch.ones_like(model.weight)
        room = coming_bytes([optimizer])
        optimizer.step()
        state = [one for values in optimizer.state.values() for one in values.values() if one is not None]
        made[type(optimizer).__name__, room // model.weight.nbytes] = sum(one.numel() > 1 for one in state)
        assert coming_bytes([optimizer]) == 0 or not state

    assert made == {("AdamW", 3): 3, ("SGD", 1): 1, ("SGD", 0): 0, ("RMSprop", 1): 1}


def test_a_buffer_has_a_storage_of_its_own_and_the_strides_of_its_tensor(tmp_path):
    arena = Arena(1 << 20)
    tensor = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    buffers = [arena.empty_like(one) for one in (tensor, tensor.bool(), torch.empty(0), torch.ones(1 << 20))]
    buffers[0].copy_(tensor)
    torch.save(buffers[0], tmp_path / "one.pt")

    assert [one.dtype for one in buffers] == [torch.float32, torch.bool, torch.float32, torch.float32]
    assert buffers[0].stride() == tensor.stride()
    assert torch.equal(torch.load(tmp_path / "one.pt", weights_only=True), tensor)
    assert (tmp_path / "one.pt").stat().st_size < 4096
    assert all(one.data_ptr() % 64 == 0 for one in buffers[:2])
