"""A signal to the whole job: workers of loaders outlive it until the training process is done with them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from stepguard.store import CheckpointStore
from stepguard.torch import Supervisor
from stepguard.torch.data.outliving import let_workers_outlive_signals, starting_workers

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "sigtimedwait"), reason="the system does not say who sends a signal"
)


class Numbers(Dataset):
    """The items say which process has loaded them. Item 50 is loaded with the help of a program of its own."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[int, int]:
        if index == 50:
            with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as program:
                program.terminate()
        return index, os.getpid()


@pytest.fixture
def workers():
    """Makes iterators over loaders with workers, and ends those that a test has left."""
    made = []

    def make(dataset: Dataset | None = None, num_workers: int = 2):
        let_workers_outlive_signals()
        loader = DataLoader(dataset or Numbers(), batch_size=None, num_workers=num_workers, prefetch_factor=1)
        with starting_workers(loader):
            made.append(iter(loader))
        return made[-1]

    yield make
    for one in made:
        one._shutdown_workers()


def from_elsewhere(number: int, pid: int) -> None:
    """Send the signal from a process that is not the parent of the worker."""
    subprocess.run(["kill", f"-{number}", str(pid)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_workers_go_on_after_a_signal_that_their_parent_has_not_sent(workers, number):
    batches = workers()
    seen = [next(batches) for _ in range(4)]
    for pid in {pid for _, pid in seen}:
        from_elsewhere(number, pid)
    seen += [next(batches) for _ in range(30)]

    assert [index for index, _ in seen] == list(range(34))
    assert len({pid for _, pid in seen}) == 2


def test_the_parents_own_terminate_ends_a_worker_at_once(workers):
    batches = workers()
    next(batches)
    worker = batches._workers[0]
    worker.terminate()
    # A worker that drops this signal too goes on for as long as its parent.
    worker.join(60)

    assert worker.exitcode == 0


class Held(Dataset):
    """Only the first item comes, so that a worker that is killed then is not just writing into the queue."""

    def __init__(self) -> None:
        self.never = multiprocessing.get_context("fork").Event()

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        if index:
            self.never.wait()
        return index


def test_a_worker_that_is_killed_is_an_error_of_the_parent_as_before(workers):
    batches = workers(Held(), num_workers=1)
    next(batches)
    os.kill(batches._workers[0].pid, signal.SIGKILL)

    with pytest.raises(RuntimeError, match="worker"):
        list(batches)


def test_a_program_that_a_worker_starts_can_be_ended_by_it(workers):
    batches = workers()

    assert [index for index, _ in batches] == list(range(100))


def test_without_workers_nothing_is_blocked():
    with starting_workers(DataLoader(Numbers(), batch_size=None)):
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with starting_workers({"one": DataLoader(Numbers(), num_workers=1)}):
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


PROGRAM = """
import sys, time
sys.modules["tensorflow"] = None
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import worker
from stepguard.torch import Supervisor, Values

# Else a worker ends by itself some seconds after its parent.
worker.MP_STATUS_CHECK_INTERVAL = 3600.0

class Slow(Dataset):
    def __len__(self):
        return 4000
    def __getitem__(self, index):
        time.sleep(0.01)
        return index

if __name__ == "__main__":
    logdir, method, loader, persistent = sys.argv[1:]
    if loader == "torchdata":
        from torchdata.stateful_dataloader import StatefulDataLoader as DataLoader
    data = DataLoader(
        Slow(), batch_size=4, num_workers=2, persistent_workers=persistent == "yes", multiprocessing_context=method
    )
    with Supervisor({"values": Values(x=0)}, logdir, save_model_secs=600).managed_session() as sess:
        for batch in sess.steps(data, accumulate=2):
            print("step", sess.global_step, flush=True)
"""


@pytest.mark.parametrize(
    ("method", "loader", "persistent"),
    [("fork", "torch", "yes"), ("spawn", "torchdata", "no"), ("forkserver", "torch", "no")],
)
def test_sigterm_to_the_whole_job_loses_no_step(tmp_path, method, loader, persistent):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "run"), method, loader, persistent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        for line in run.stdout:
            if line == "step 4\n":
                os.killpg(run.pid, signal.SIGTERM)
                break
        begun = max([4, *(int(line.split()[1]) for line in run.stdout)])

    assert run.returncode == -signal.SIGTERM
    assert CheckpointStore(tmp_path / "run").newest_good(quarantine=False).checkpoint.step == begun + 1


def test_workers_end_with_their_parent(tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "run"), "fork", "torch", "no"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        while run.stdout.readline() != "step 1\n":
            pass
        workers = psutil.Process(run.pid).children()
        run.kill()

    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=60)[1] == []


class Broken(Numbers):
    """Item 20 cannot be read."""

    def __getitem__(self, index: int) -> tuple[int, int]:
        if index == 20:
            raise OSError("no such image")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_reading_the_data_loses_no_step(tmp_path, workers, caplog):
    model = torch.nn.Linear(1, 1)
    sv = Supervisor({"model": model}, tmp_path, save_model_secs=600)
    with pytest.raises(OSError, match="no such image"), sv.managed_session() as sess:
        for _ in sess.steps(DataLoader(Broken(), batch_size=4, num_workers=workers)):
            pass

    assert CheckpointStore(tmp_path).newest_good(quarantine=False).checkpoint.step == 5
    # Numbers that a loader draws in this process are no part of a step.
    assert ("are drawn again" in caplog.text) == (workers == 0)


def test_an_error_in_the_middle_of_an_accumulated_step_leaves_it_torn(tmp_path):
    sv = Supervisor({"model": torch.nn.Linear(1, 1)}, tmp_path, save_model_secs=600)
    with pytest.raises(OSError, match="no such image"), sv.managed_session() as sess:
        for _ in sess.steps(DataLoader(Broken(), batch_size=4), accumulate=2):
            pass

    assert CheckpointStore(tmp_path).newest_good(quarantine=False).checkpoint.step == 0
