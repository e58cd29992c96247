"""The programs of the soak, which a zygote forks: the engine suite's, on the engine that SOAK_ENGINE names."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import time
from typing import Any

from zygote import report

from stepguard.options import Saving

SIZE = 24
PROGRAMS = {
    "numpy": ("programs_numpy", "NumPyUnderTest"),
    "tensorflow": ("programs_tensorflow", "TensorFlowUnderTest"),
    "torch": ("programs_torch", "TorchUnderTest"),
    "jax": ("programs_jax", "JaxUnderTest"),
}


def engine_under_test(name: str) -> Any:
    """The suite's adapter of an engine."""
    module, kind = PROGRAMS[name]
    return getattr(importlib.import_module(module), kind)()


# Only in the zygote of an engine, which imports its framework once for all of its children.
_engine = engine_under_test(os.environ["SOAK_ENGINE"]) if "SOAK_ENGINE" in os.environ else None


def train(logdir: str, steps: int, pause_secs: float) -> None:
    """Train, and report at which step the run began, each step, and its end."""
    assert _engine is not None
    program = _engine.program(
        logdir, size=SIZE, save_model_secs=0, saving=Saving(save_model_steps=5, save_at_end=True), save_summaries_secs=0
    )
    with program.sv.managed_session() as session:
        began = program.step(session)
        report("began", step=began, is_whole=program.values(session) == [began] * SIZE)
        for number in range(1, steps + 1):
            if program.sv.should_stop():
                break
            program.run_step(session)
            report("step", step=began + number)
            time.sleep(pause_secs)
    report("ended")


def train_in_a_group(logdir: str, steps: int, pause_secs: float) -> None:
    """Train as the first of a group of processes: one that Python has forked, and one that C code has."""
    os.setpgid(0, 0)
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    assert _engine is not None
    program = _engine.program(logdir, size=SIZE, save_model_secs=0, saving=Saving(save_model_steps=5))
    with program.sv.managed_session() as session:
        began = program.step(session)
        # C code that forks knows nothing of Python's hooks: this child has the descriptor of the lock.
        if ctypes.CDLL(None).fork() == 0:
            while True:
                signal.pause()
        report("began", step=began, is_whole=program.values(session) == [began] * SIZE)
        for number in range(1, steps + 1):
            program.run_step(session)
            report("step", step=began + number)
            time.sleep(pause_secs)
