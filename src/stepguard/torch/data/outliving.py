"""Workers of DataLoaders that outlive a signal to the whole job, until their parent is done with them.

A scheduler, a launcher or a terminal sends SIGTERM, SIGUSR1, SIGUSR2 or SIGINT to every process of a job. The training
process stops at the next step boundary, and may need more batches to get there. A worker that ends at once takes the
running step with it, because PyTorch raises an error in the training process, between any two lines, when a worker has
died.

The protocol: the main thread of a worker blocks these signals (SIGUSR1 and SIGUSR2 only if nothing handles them), and
the thread ``stepguard-outliving`` waits for them. A SIGTERM from the parent ends the worker at once, as PyTorch's own
handler does. Any other signal is dropped. The thread looks for the parent once a second and ends the worker when the
parent is gone; otherwise nothing would end a worker that waits for the disk. SIGKILL and crashes end a worker as
before, so PyTorch still detects dead workers. A worker that starts a program of its own accepts the signals again from
then on: the program would inherit the block, and could not be ended by its worker.

PyTorch has no hook that runs in every worker, and ``worker_init_fn`` belongs to the program. So the function that
workers run is replaced by one that prepares the worker first. Where the system does not tell who has sent a signal (it
is macOS), workers are as PyTorch makes them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader

from stepguard.coordination.signals import has_default_action
from stepguard.disk import system
from stepguard.torch.data.workers import with_seeded_indices

# Where the function is called from that runs in a worker: PyTorch's, and torchdata's where it is loaded.
_CALLERS = ("torch.utils.data._utils.worker", "torchdata.stateful_dataloader.stateful_dataloader")
_LOOP = "_worker_loop"
_LOOK_SECS = 1.0


def let_workers_outlive_signals() -> None:
    """Make the workers that this process starts from now on outlive SIGTERM, SIGUSR1, SIGUSR2 and SIGINT.

    Main thread or any other. A second call adds what was imported since the first.
    """
    if not system.tells_senders():
        return
    for name in _CALLERS:
        module = sys.modules.get(name)
        loop = getattr(module, _LOOP, None)
        if callable(loop) and not isinstance(loop, _OutlivingLoop):
            setattr(module, _LOOP, _OutlivingLoop(name, loop))


@contextmanager
def starting_workers(loader: Any) -> Iterator[None]:
    """A block that starts the workers of ``loader``: a signal does not end them before they are prepared.

    A new interpreter (the start methods "spawn" and "forkserver") takes seconds to get there. The block of the signals
    is inherited by the workers, and by the server that forks them.
    """
    let_workers_outlive_signals()
    methods = _start_methods(loader)
    if not system.tells_senders() or not methods:
        yield
        return
    if methods != {"fork"}:
        # Started now, because its start accepts the signals again. It ignores both of them itself.
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepares_workers() -> bool:
    """Whether the workers that this process starts for a DataLoader of PyTorch's are prepared here."""
    return isinstance(getattr(sys.modules.get(_CALLERS[0]), _LOOP, None), _OutlivingLoop)


def _start_methods(loader: Any) -> set[str]:
    """How ``loader``, or each of a mapping or sequence of loaders, starts its workers; empty if it has none."""
    if isinstance(loader, DataLoader):
        context = loader.multiprocessing_context or multiprocessing
        return {context.get_start_method()} if loader.num_workers else set()
    loaders = loader.values() if isinstance(loader, Mapping) else loader if isinstance(loader, (list, tuple)) else ()
    return {method for one in loaders for method in _start_methods(one)}


class _OutlivingLoop:
    """What a worker runs: it is prepared first, and then runs ``loop``. A new interpreter finds that by its module."""

    def __init__(self, module: str, loop: Callable[..., None] | None = None) -> None:
        self._module = module
        self._loop = getattr(importlib.import_module(module), _LOOP) if loop is None else loop

    def __reduce__(self) -> tuple[Any, ...]:
        return _OutlivingLoop, (self._module,)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        _outlive()
        self._loop(*with_seeded_indices(self._loop, args), **kwargs)


_OF_PROGRAMS = (signal.SIGUSR1, signal.SIGUSR2)
_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, *_OF_PROGRAMS})


def _outlive() -> None:
    """Prepare this worker. Called in its main thread, before PyTorch sets its own handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    signals = set(_SIGNALS)
    handled = {one for one in _OF_PROGRAMS if not has_default_action(one)}
    signals -= handled
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
    sys.addaudithook(_accept_signals_again)
    threading.Thread(target=_wait_for_the_end, args=(signals,), name="stepguard-outliving", daemon=True).start()


def _wait_for_the_end(signals: set[signal.Signals]) -> None:
    is_alive = _parent()
    parent = multiprocessing.parent_process()
    senders = {os.getppid(), None if parent is None else parent.pid}
    while is_alive():
        # A worker that was stopped meanwhile may get a stale signal here, which is one that was dropped before.
        received = system.signal_within(signals, _LOOK_SECS)
        if received is not None and received[0] == signal.SIGTERM and received[1] in senders:
            break
    os._exit(0)


def _parent() -> Callable[[], bool]:
    """A function that says whether the process that trains is alive."""
    parent = multiprocessing.parent_process()
    forked_by = os.getppid()
    if parent is not None and parent.pid != forked_by:
        # The server of the start method "forkserver" has forked this worker, and may end before the training.
        return parent.is_alive
    return lambda: os.getppid() == forked_by


def _accept_signals_again(event: str, arguments: tuple[Any, ...]) -> None:  # noqa: ARG001 - the form of an audit hook
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
