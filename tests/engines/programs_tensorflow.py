"""The suite's programs on TensorFlow: each integer is a variable of its own, and a step raises one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf
from programs import EngineUnderTest, Program, Values

from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1


class TensorFlowProgram(Program):
    def __init__(self, logdir: Path | str | None, *, size: int, **options: Any) -> None:
        self._prepare_error: BaseException | None = None
        self._halfway: Callable[[], object] = int
        self._graph = tf.Graph()
        with self._graph.as_default():
            self._step = v1.train.get_or_create_global_step()
            variables = [v1.get_variable(f"v{index}", [], tf.int64, v1.zeros_initializer()) for index in range(size)]
            self._train = self._step_over(variables)
            self._train_with = self._step_over(variables, halfway=True)
            self._values = [variable.read_value() for variable in variables]
            v1.summary.scalar("first", variables[0])
            weight = v1.get_variable("weight", [], tf.float32, v1.zeros_initializer())
            self._spoil = weight.assign(float("nan")).op
            self.sv = Supervisor(logdir=logdir, init_fn=self._on_init, **options)

    def _step_over(self, variables: list[Any], *, halfway: bool = False) -> Any:
        raised: Any = tf.no_op()
        for number, variable in enumerate(variables):
            # One after the other: the time between the first and the last is the time in which a save would tear.
            with tf.control_dependencies([raised]):
                raised = variable.assign_add(1, read_value=False)
            if halfway and number == 0:
                with tf.control_dependencies([raised]):
                    raised = tf.numpy_function(lambda: self._halfway() or 0, [], tf.int64)
        with tf.control_dependencies([raised]):
            return self._step.assign_add(1).op

    def _on_init(self, session: Any) -> None:
        if self._prepare_error is not None:
            raise self._prepare_error

    def run_step(self, session: Any) -> None:
        session.run(self._train)

    def run_step_with(self, session: Any, halfway: Callable[[], object]) -> None:
        self._halfway = halfway
        session.run(self._train_with)

    def values(self, session: Any) -> Values:
        return [int(value) for value in session.run(self._values)]

    def step(self, session: Any) -> int:
        return int(session.run(self._step))

    def report(self, session: Any, number: float) -> None:
        self.sv.summary_computed(session, v1.Summary(value=[v1.Summary.Value(tag="loss", simple_value=number)]))

    def spoil(self, session: Any) -> None:
        session.run(self._spoil)

    def fail_prepare(self, error: BaseException) -> None:
        self._prepare_error = error


class TensorFlowUnderTest(EngineUnderTest):
    name = "tensorflow"

    def program(self, logdir: Path | str | None, *, size: int = 6, **options: Any) -> TensorFlowProgram:
        return TensorFlowProgram(logdir, size=size, **options)

    def end_of_input(self) -> Exception:
        return tf.errors.OutOfRangeError(None, None, "no more input")

    def read(self, checkpoint: Path) -> Values:
        reader = tf.train.load_checkpoint(str(checkpoint))
        assert int(reader.get_tensor("global_step")) == int(checkpoint.name.rpartition("-")[2])
        names = sorted(name for name in reader.get_variable_to_shape_map() if name.startswith("v"))
        return [int(reader.get_tensor(name)) for name in names]
