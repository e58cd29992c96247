"""A TensorFlow model whose whole state anyone can compute who knows the step.

Every variable is a function of the step: ``counter<i>`` is ``(i + 1) * step``, ``big`` is full of the step, and
``mixed`` has gone through the same arithmetic at each step, so that doing one twice, or leaving one out, shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1

COUNTERS = 6
_FACTOR = 6364136223846793005
_SUMMAND = 1442695040888963407


def mixed(step: int) -> int:
    """``x -> x * FACTOR + SUMMAND`` modulo 2**64, ``step`` times, from 0; as a signed number."""
    modulus = 1 << 64
    factor, summand = 1, 0
    power, rest = (_FACTOR, _SUMMAND), step
    while rest:
        if rest & 1:
            factor, summand = factor * power[0] % modulus, (summand * power[0] + power[1]) % modulus
        power = power[0] * power[0] % modulus, (power[1] * power[0] + power[1]) % modulus
        rest >>= 1
    return summand - modulus if summand >= modulus // 2 else summand


def wrong(step: int, state: dict[str, Any]) -> list[str]:
    """The names of the variables that do not hold what they hold at ``step``."""
    found = []
    for name, value in state.items():
        if name.startswith("counter"):
            expected = (int(name.removeprefix("counter")) + 1) * step
        elif name == "mixed":
            expected = mixed(step)
        else:
            expected = step
        if not np.all(np.asarray(value) == expected):
            found.append(f"{name}: expected {expected}, found {np.unique(np.asarray(value))[:5]}")
    return found


class Model:
    """The graph, built in the default graph. ``threads``: the steps may run side by side, so nothing is ``mixed``."""

    def __init__(self, *, megabytes: float = 0.01, threads: bool = False, has_global_step: bool = True) -> None:
        self.variables: dict[str, Any] = {}
        for index in range(COUNTERS):
            self._add(f"counter{index}", [])
        self._add("big", [max(1, int(megabytes * 131072))])
        if not threads:
            self._add("mixed", [])
        changed: Any = tf.no_op()
        for name, variable in self.variables.items():
            # One after the other: the time between the first and the last is when a save would mix two steps.
            with tf.control_dependencies([changed]):
                if name == "mixed":
                    changed = variable.assign(variable.read_value() * _FACTOR + _SUMMAND, read_value=False)
                else:
                    by = int(name.removeprefix("counter")) + 1 if name.startswith("counter") else 1
                    changed = variable.assign_add(tf.fill(variable.shape, tf.constant(by, tf.int64)), read_value=False)
        if has_global_step:
            step = v1.train.get_or_create_global_step()
            with tf.control_dependencies([changed]):
                changed = step.assign_add(1, read_value=False)
            self.variables["global_step"] = step
        self.train_op = changed if isinstance(changed, tf.Operation) else changed.op
        self._fetches = {name: variable.read_value() for name, variable in self.variables.items()}

    def _add(self, name: str, shape: list[int]) -> None:
        self.variables[name] = v1.get_variable(
            name, shape, tf.int64, v1.zeros_initializer(), use_resource=True, trainable=False
        )

    def state(self, session: Any) -> dict[str, Any]:
        """All variables."""
        found: dict[str, Any] = session.run(self._fetches)
        return found

    def step(self, session: Any) -> int:
        """The step that the variables are at, whether or not there is a global step."""
        return int(session.run(self._fetches["counter0"]))


def read(prefix: Path | str) -> dict[str, Any]:
    """What a checkpoint holds, read by TensorFlow's own reader."""
    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
