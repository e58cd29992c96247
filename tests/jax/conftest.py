"""The tests of the JAX engine, on eight devices of the CPU; they are passed over where JAX is not installed."""

import importlib.util
import os
import sys
from pathlib import Path

collect_ignore_glob = [] if importlib.util.find_spec("jax") else ["*"]

# Read when JAX is first used, which is after all tests are collected.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

sys.path.insert(0, str(Path(__file__).parent))
# For what is crafted: its modules know no framework.
sys.path.append(str(Path(__file__).parent.parent / "process"))
