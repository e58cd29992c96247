"""Training and evaluation modes: a resumed run trains in the mode of the interrupted one."""

from __future__ import annotations

import contextlib
import logging
import signal

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stepguard.options import Saving
from stepguard.torch import Supervisor

X = torch.linspace(-1, 1, 24).reshape(12, 2)


def model():
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))


def epochs(sv, sess, net, train):
    """An evaluation after each epoch leaves the model in eval()."""
    for _ in sess.epochs(4):
        for (x,) in sess.steps(DataLoader(TensorDataset(X), batch_size=3)):
            train(x)
        net.eval()


def epochs_begun(sv, sess, net, train):
    for _ in sess.epochs(4):
        net.train()
        net[1].eval()
        for (x,) in sess.steps(DataLoader(TensorDataset(X), batch_size=3)):
            train(x)
        net.eval()


def built_for_evaluation(sv, sess, net, train):
    net.eval()
    epochs_begun(sv, sess, net, train)


def evaluated_in_steps(sv, sess, net, train):
    for (x,) in sess.steps(DataLoader(TensorDataset(X), batch_size=3), epochs=4):
        net.train()
        train(x)
        if sess.global_step % 3 == 2:
            net.eval()


def evaluated_at_the_end(sv, sess, net, train):
    """The last checkpoint is of the state as the program leaves it."""
    for (x,) in sess.steps(DataLoader(TensorDataset(X), batch_size=3), epochs=4):
        train(x)
    net.eval()
    torch.nn.init.zeros_(net[0].bias)


def own_loop(sv, sess, net, train):
    """It evaluates after a block, and never trains in train() again."""
    while sess.global_step < 16:
        with sess.step():
            train(X[:3])
        if sess.global_step == 6:
            net.eval()


def own_loop_that_looks(sv, sess, net, train):
    while sess.global_step < 16 and not sv.should_stop():
        with sess.step():
            train(X[:3])
    net.eval()


PROGRAMS = [
    epochs,
    epochs_begun,
    built_for_evaluation,
    evaluated_in_steps,
    evaluated_at_the_end,
    own_loop,
    own_loop_that_looks,
]


def trained(program, logdir, ends_at=None):
    """The modes of all modules in each step, and the weights at the end."""
    torch.manual_seed(0)
    net, modes = model(), {}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    saving = Saving(save_model_secs=0, save_at_end=True)
    sv = Supervisor({"net": net, "optimizer": optimizer}, logdir, saving=saving, save_summaries_secs=0)

    def train(x):
        optimizer.zero_grad()
        modes[sess.global_step] = [one.training for one in net.modules()]
        net(x).square().mean().backward()
        optimizer.step()
        if ends_at is not None and sess.global_step + 1 == ends_at:
            if program is own_loop:
                signal.raise_signal(signal.SIGINT)  # It does not look.
            sv.request_stop()

    with contextlib.suppress(KeyboardInterrupt), sv.managed_session() as sess:
        program(sv, sess, net, train)
    return modes, [one.tolist() for one in net.state_dict().values()]


@pytest.mark.parametrize("ends_at", [4, 6, 7, 9])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.__name__)
def test_a_resumed_run_trains_in_the_modes_of_the_interrupted_one(program, ends_at, tmp_path, caplog):
    modes, weights = trained(program, tmp_path / "whole")
    first, _ = trained(program, tmp_path / "run", ends_at)
    assert len(first) == ends_at
    with caplog.at_level(logging.WARNING, "stepguard"):
        again, resumed = trained(program, tmp_path / "run")
    assert again == {step: modes[step] for step in modes if step >= ends_at}
    if program is not evaluated_at_the_end:
        assert resumed == weights
    said = [one.getMessage() for one in caplog.records if "mode" in one.getMessage() or "eval()" in one.getMessage()]
    # It may evaluate in a step, and has called train() on its way to the next one.
    assert not said


def test_a_program_that_sets_another_mode_on_its_way_is_told(tmp_path, caplog):
    def changed(sv, sess, net, train):
        net.eval()
        epochs(sv, sess, net, train)

    trained(epochs, tmp_path, 2)
    modes, _ = trained(changed, tmp_path)

    assert modes[2] == [True] * 4
    (message,) = [one.getMessage() for one in caplog.records if "until the program sets the mode again" in one.message]
    assert message.startswith("net was in train() when the run was interrupted, and the program has called eval()")


def test_a_checkpoint_before_the_first_step_of_a_restart_has_the_modes_of_the_interrupted_run(tmp_path):
    trained(evaluated_in_steps, tmp_path, 6)
    found = []

    def looks(sv, sess, net, train):
        found.append(sess.process_state.capture()["modes"])

    trained(looks, tmp_path)
    assert found == [{"net": False}]
