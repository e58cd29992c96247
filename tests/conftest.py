"""The environment of every test, set before any of them imports TensorFlow. Processes that tests start inherit it."""

import gc
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else sums differ in their last bits from run to run
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the tests need no accelerator, and must not take somebody's

# A script that starts the gate in its background has it ignore Ctrl-C, and so would all that the tests send one to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, because their programs run in processes of their own. They come first, so that the others
# run beside them and not before them.
_LONGEST = [
    "torch/test_examples_torch.py",
    "docs/test_pages.py",
    "test_benchmarks.py",
    "process/test_states_at_end.py",
    "replicas/test_example.py",
    "torch/test_torchrun.py",
    "test_examples.py",
    "store/test_store_powerloss.py",
    "torch/test_nodes.py",
    "replicas/test_loss.py",
    "replicas/test_saving.py",
    "process/test_uses.py",
    "process/test_kills.py",
    "replicas/test_waiting.py",
    "replicas/test_rounds.py",
    "torch/test_resume.py",
    "torch/test_fsdp.py",
    "torch/test_kills.py",
    "torch/test_causes.py",
    "torch/test_examples_killed.py",
    "torch/test_examples_proven.py",
    "replicas/test_start.py",
    "replicas/test_masters.py",
    "process/test_endings.py",
    "jax/test_examples_jax.py",
    "jax/test_distributed.py",
    "store/test_store_save_errors.py",
    "tensorflow/test_install.py",
    "process/test_evaluations.py",
    "proving/test_prove.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> None:
    """Have the garbage collector pass over what is there before: to go through all frameworks takes 0.4 s each time."""
    gc.collect()
    gc.freeze()
