"""A real ``tf.compat.v1.Session`` that marks its step boundaries."""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from types import TracebackType
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from stepguard.engine import ValueWatch
from stepguard.store import Recovery
from stepguard.tensorflow.boundary import Boundary
from stepguard.tensorflow.cluster.sync_replicas import AggregatingRun, gradients_taken
from stepguard.tensorflow.coordinator import CLEAN_STOP_TYPES
from stepguard.tensorflow.run_trace import RunTrace
from stepguard.tensorflow.scalars import of_run

# How long the exit of the process waits for threads whose session it has closed.
_EXIT_SECS = 1.0
_LOOK_SECS = 0.005


class Session(tf.compat.v1.Session):
    """The session that ``managed_session`` returns: TensorFlow's own session, with its step boundaries marked.

    Until :meth:`watch` is called, it is TensorFlow's session and nothing more. From then on, each run that can change
    the saved state is a step; snapshots are taken between two steps, never during one. All other runs are unchanged.
    """

    def __init__(self, target: str = "", graph: Any = None, config: Any = None) -> None:
        # Whether the variables live in this process.
        self.is_local = not target
        self._pid = os.getpid()
        # The version of the finalised graph that the runtime already has; ``None`` while the graph may still grow.
        self._extended_to: int | None = None
        self._boundary: Boundary | None = None
        self._before_close: Callable[[], None] | None = None
        self._around_save: Callable[[str, Any], AbstractContextManager[None]] | None = None
        self._not_joined: Callable[[], AbstractContextManager[None]] = nullcontext
        # The threads that are inside `_waiting`.
        self._waits: set[int] = set()
        # look_at(needed, fetches, result) shows the NaN guard the result of a step that ran `needed`.
        self._look_at: Callable[[Any, Any, Any], Any] | None = None
        self._trace: RunTrace | None = None
        self.recovered: Recovery | None = None
        """The result of the search for a checkpoint during preparation; ``None`` if there was no search."""
        super().__init__(target, graph=graph, config=config)

    def watch(
        self,
        boundary: Boundary,
        before_close: Callable[[], None],
        around_save: Callable[[str, Any], AbstractContextManager[None]],
        not_joined: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Mark the steps of this session in ``boundary``.

        ``before_close()`` is called if the program itself closes the session. A run of an operation by its name, which
        is how a Saver saves, is made inside ``around_save(name, feeds)``. A thread that only the closing of the session
        can free waits inside ``not_joined()``.
        """
        self._not_joined = not_joined
        self._around_save = around_save
        self._boundary = boundary
        self._before_close = before_close

    def unwatch(self) -> None:
        """Undo :meth:`watch`: from now on this is TensorFlow's session and nothing more."""
        self._boundary = None
        self._before_close = None
        self._around_save = None
        self._trace = None
        self._unwatch_values()

    def watch_values(self, watch: ValueWatch) -> None:
        """Show ``watch`` the scalars that each step returns.

        This replaces methods of this one object, so that a session that is not watched pays nothing for its steps.
        """
        self._unwatch_values()
        run, partial_run, make_callable = self.run, self.partial_run, self.make_callable

        def look_at(needed: Any, fetches: Any, result: Any) -> Any:
            boundary = self._boundary
            if boundary is not None and boundary.is_step(needed) and watch.look(of_run(fetches, result)):
                watch.settle()
            return result

        def looked_at(fetches: Any, result: Any) -> Any:
            return look_at(fetches, fetches, result)

        def watched_run(fetches: Any, feed_dict: Any = None, options: Any = None, run_metadata: Any = None) -> Any:
            return looked_at(fetches, run(fetches, feed_dict, options, run_metadata))

        def watched_partial_run(handle: Any, fetches: Any, feed_dict: Any = None) -> Any:
            return looked_at(fetches, partial_run(handle, fetches, feed_dict))

        def watched_make_callable(fetches: Any, feed_list: Any = None, accept_options: bool = False) -> Any:
            function = make_callable(fetches, feed_list, accept_options)
            # With feeds the function calls `run`, which already looks at the values.
            return function if feed_list else lambda *args, **kwargs: looked_at(fetches, function(*args, **kwargs))

        self._look_at = look_at
        self.__dict__.update(run=watched_run, partial_run=watched_partial_run, make_callable=watched_make_callable)

    def trace_with(self, trace: RunTrace) -> None:
        """Tell ``trace`` of each step."""
        self._trace = trace

    @property
    def trace(self) -> RunTrace | None:
        """Where the steps are told; ``None`` if nowhere."""
        return self._trace

    def _unwatch_values(self) -> None:
        self._look_at = None
        for name in ("run", "partial_run", "make_callable"):
            self.__dict__.pop(name, None)

    @property
    def boundary(self) -> Boundary | None:
        """Where the steps of this session are marked; ``None`` before :meth:`watch`."""
        return self._boundary

    def run(self, fetches: Any, feed_dict: Any = None, options: Any = None, run_metadata: Any = None) -> Any:
        """Run operations and evaluate tensors, as ``tf.compat.v1.Session.run`` does. Any thread."""
        boundary = self._boundary
        if boundary is None:
            return super().run(fetches, feed_dict, options, run_metadata)
        if type(fetches) is str and (around_save := self._around_save) is not None:
            with around_save(fetches, feed_dict):
                return self._run_marked(boundary, fetches, feed_dict, options, run_metadata)
        # The same as `_run_marked`, inlined because it runs at every step.
        if not boundary.is_step(fetches):
            boundary.pass_by(fetches)
            return super().run(fetches, feed_dict, options, run_metadata)
        boundary.enter(fetches)
        try:
            result = super().run(fetches, feed_dict, options, run_metadata)
        finally:
            boundary.leave()
        trace = self._trace
        if trace is not None and (result is not None or trace.wants_digests):
            trace.ran(fetches, result, feed_dict)
        return result

    def _run_marked(self, boundary: Boundary, fetches: Any, feed_dict: Any, options: Any, run_metadata: Any) -> Any:
        if not boundary.is_step(fetches):
            boundary.pass_by(fetches)
            return super().run(fetches, feed_dict, options, run_metadata)
        boundary.enter(fetches)
        try:
            return super().run(fetches, feed_dict, options, run_metadata)
        finally:
            boundary.leave()

    def read(self, fetches: Any) -> Any:
        """Run ``fetches``, which must change no state, as a holder of the boundary: the run does not wait for it."""
        return super().run(fetches)

    def unmarked(self) -> UnmarkedSession:
        """This session for a holder of the boundary that changes the saved state: its runs are no steps."""
        return UnmarkedSession(self.graph, super().run)

    def partial_run(self, handle: Any, fetches: Any, feed_dict: Any = None) -> Any:
        """Continue a partial run. A boundary may fall between two of its parts."""
        boundary = self._boundary
        if boundary is None or not boundary.is_step(fetches):
            return super().partial_run(handle, fetches, feed_dict)
        boundary.enter(fetches)
        try:
            result = super().partial_run(handle, fetches, feed_dict)
        finally:
            boundary.leave()
        if self._trace is not None:
            self._trace.ran(fetches, result, feed_dict)
        return result

    def make_callable(self, fetches: Any, feed_list: Any = None, accept_options: bool = False) -> Callable[..., Any]:
        """A function that runs ``fetches``, as ``tf.compat.v1.Session.make_callable`` does."""
        taken = gradients_taken(self.graph, fetches) if self.is_local and not feed_list else []
        if taken:
            return self._aggregating(fetches, taken)
        function = super().make_callable(fetches, feed_list, accept_options)
        # With feeds the function calls `run`, which marks and tells the step.
        return self._marked(fetches, function, None if feed_list else fetches)

    def _aggregating(self, fetches: Any, taken: list[Any]) -> Callable[..., Any]:
        """A function that runs ``fetches``, which need the gradients ``taken`` from accumulators."""
        run = super().run
        if isinstance(fetches, tf.Operation):
            # A callable takes a quarter of the time of a run; every training step waits for it.
            options = config_pb2.CallableOptions(feed=[one.name for one in taken], target=[fetches.name])
            apply = super()._make_callable_from_options(options)
        else:

            def apply(*gradients: Any) -> Any:
                return run(fetches, dict(zip(taken, gradients, strict=True)))

        def step(*gradients: Any) -> Any:
            boundary = self._boundary
            if boundary is None:
                return apply(*gradients)
            boundary.enter_for_others(fetches)
            try:
                return apply(*gradients)
            finally:
                boundary.leave()

        _waiting.add(self)
        return AggregatingRun(super().make_callable(taken), step, self._waiting)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Mark the block as a wait in native code that only the closing of this session ends."""
        thread = get_ident()
        self._waits.add(thread)
        try:
            with self._not_joined():
                yield
        finally:
            self._waits.discard(thread)

    def _make_callable_from_options(self, callable_options: Any) -> Callable[..., Any]:
        """A function that runs the elements named in ``callable_options``; Keras runs its steps by it."""
        fetched, needed = self._elements(callable_options)
        function = self._marked(needed, super()._make_callable_from_options(callable_options), fetched)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return result if self._look_at is None else self._look_at(needed, fetched, result)

        return call

    def _elements(self, options: Any) -> tuple[list[Any], list[Any]]:
        """The elements that a callable with these options returns, and all elements that it runs."""
        fetched = [self.graph.as_graph_element(name) for name in options.fetch]
        return fetched, [*fetched, *(self.graph.as_graph_element(name) for name in options.target)]

    def _marked(self, fetches: Any, function: Callable[..., Any], returned: Any) -> Callable[..., Any]:
        """Wrap ``function``, which runs ``fetches``, so that its steps are marked, and what it returns is told."""

        def call(*args: Any, **kwargs: Any) -> Any:
            boundary = self._boundary
            if boundary is None or not boundary.is_step(fetches):
                return function(*args, **kwargs)
            boundary.enter(fetches)
            try:
                result = function(*args, **kwargs)
            finally:
                boundary.leave()
            if self._trace is not None and returned is not None:
                self._trace.ran(returned, result, None)
            return result

        return call

    def _extend_graph(self) -> None:
        # TensorFlow extends the graph before each run, inside a lock of the graph. If Ctrl-C comes while that lock is
        # being taken, it stays locked, and the next run (which saves the last step) would wait for ever.
        graph = self.graph
        version = graph.version if graph.finalized else None
        if version is None or version != self._extended_to:
            super()._extend_graph()
            self._extended_to = version

    def __exit__(
        self,
        exec_type: type[BaseException] | None,
        exec_value: BaseException | None,
        exec_tb: TracebackType | None,
    ) -> Any:
        """Close the session at the end of a `with` block. After an error the last step is not saved."""
        if isinstance(exec_value, Exception) and not isinstance(exec_value, CLEAN_STOP_TYPES):
            self._before_close = None
        return super().__exit__(exec_type, exec_value, exec_tb)

    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if _is_finalizing():
            # While the interpreter ends, the threads that would save the last step no longer run.
            self._before_close = None
        super().__del__()

    def close(self) -> None:
        """Close the session. A supervisor that still watches it saves the last step first."""
        before_close, self._before_close = self._before_close, None
        if before_close is not None:
            before_close()
        self._unwatch_values()
        super().close()


# The sessions in which a thread may wait in native code until the session is closed.
_waiting: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_waiting() -> None:
    """Close the sessions in which threads wait in native code, and wait a moment for these threads.

    A thread that returns from native code while the interpreter ends would crash the process.
    """
    mine = [session for session in list(_waiting) if session._pid == os.getpid()]
    for session in mine:
        session.unwatch()
        session.close()
    deadline = time.monotonic() + _EXIT_SECS
    while any(session._waits for session in mine) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECS)


class UnmarkedSession:
    """The part of a session that a Saver needs. Its runs are no steps."""

    def __init__(self, graph: Any, run: Callable[..., Any]) -> None:
        self.graph = graph
        self.run = run
