"""The private methods and attributes of TensorFlow's Supervisor that its subclasses override and use.

Many public programs subclass TensorFlow's Supervisor. Its constructor makes each part in a method that a subclass may
override (``_init_saver``, ``_verify_setup`` ...) and keeps the part in an attribute (``_saver``, ``_summary_writer``
...), which a subclass reads, or sets before its first session. This module has all of them under the same names: the
constructor calls the methods, and each session is prepared from the values that the attributes then have.

Some subclasses have a constructor that does not call TensorFlow's, but does the same: it calls the methods and sets the
attributes. Such an object is completed at its first use.

A subclass that uses a name which Stepguard needs for itself is refused when the class, or its object, is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tensorflow as tf

from stepguard.tensorflow import arguments, defaults
from stepguard.tensorflow.coordinator import Coordinator
from stepguard.tensorflow.defaults import USE_DEFAULT, is_default
from stepguard.words import logger

_log = logger(__name__)
_v1 = tf.compat.v1

# The names of TensorFlow's own class: this module is imported before `install` can replace that class.
_THEIRS = frozenset(dir(_v1.train.Supervisor))

# Stepguard's own methods for programs, which nothing else calls: a subclass may have others of these names.
_FOR_PROGRAMS = frozenset({"metrics", "save"})

_PARTS = (
    "_graph",
    "_meta_graph_def",
    "ready_op",
    "ready_for_local_init_op",
    "init_op",
    "_init_feed_dict",
    "_local_init_op",
    "_init_fn",
    "saver",
    "summary_op",
    "global_step",
    "session_manager",
    "_logdir",
    "save_path",
    "summary_writer",
    "save_summaries_secs",
    "save_model_secs",
    "_stop_grace_secs",
)
"""The parts that a session depends on, by the names under which TensorFlow's class reads them."""


class Subclassable:
    """The methods that make the parts of a Supervisor; each leaves its result in attributes.

    The constructor calls them in this order. ``_write_graph`` is called when the chief has prepared a session.
    """

    _graph: Any
    _is_chief: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        base = next(one for one in cls.__mro__ if one.__module__.startswith("stepguard."))
        if cls is not base:
            ours = {name for name in dir(base) if name not in _THEIRS | _FOR_PROGRAMS and not name.startswith("__")}
            refuse_names(cls, sorted(ours & vars(cls).keys()))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_coord" and type(value) is tf.train.Coordinator and name not in vars(self):
            _log.warning("%s: _coord is a coordinator of Stepguard's, in place of TensorFlow's", type(self).__name__)
            value = Coordinator(value._clean_stop_exception_types)
        if name == "_coord" and not isinstance(value, Coordinator):
            raise TypeError(
                f"{type(self).__name__}: _coord: expected a stepguard.tensorflow.Coordinator, found "
                f"{type(value).__name__}: the services and sessions need more of it than TensorFlow's does"
            )
        super().__setattr__(name, value)

    def _init_ready_op(self, ready_op: Any = USE_DEFAULT, ready_for_local_init_op: Any = USE_DEFAULT) -> None:
        keys = _v1.GraphKeys
        self._ready_op = self._or_default(ready_op, keys.READY_OP, _v1.report_uninitialized_variables)
        self._ready_for_local_init_op = self._or_default(
            ready_for_local_init_op, keys.READY_FOR_LOCAL_INIT_OP, lambda: None
        )

    def _init_init_op(self, init_op: Any = USE_DEFAULT, init_feed_dict: Any = None) -> None:
        self._init_op = self._or_default(init_op, _v1.GraphKeys.INIT_OP, _v1.global_variables_initializer)
        self._init_feed_dict = init_feed_dict

    def _init_local_init_op(self, local_init_op: Any = USE_DEFAULT) -> None:
        self._local_init_op = self._or_default(local_init_op, _v1.GraphKeys.LOCAL_INIT_OP, defaults.local_init)

    def _init_saver(self, saver: Any = USE_DEFAULT) -> None:
        self._saver = self._or_default(saver, _v1.GraphKeys.SAVERS, defaults.saver_of_all_variables)

    def _init_summary_op(self, summary_op: Any = USE_DEFAULT) -> None:
        self._summary_op = self._or_default(summary_op, _v1.GraphKeys.SUMMARY_OP, _v1.summary.merge_all)

    def _init_global_step(self, global_step: Any = USE_DEFAULT) -> None:
        self._global_step = self._or_default(global_step, _v1.GraphKeys.GLOBAL_STEP, self._default_global_step_tensor)

    def _verify_setup(self) -> None:
        if not self._is_chief:
            arguments.check_devices(self._graph)

    def _default_global_step_tensor(self) -> Any:
        return defaults.named_global_step()

    def _get_first_op_from_collection(self, key: str) -> Any:
        found = _v1.get_collection(key)
        if len(found) > 1:
            _log.info("the collection %s holds %d items; the first is used", key, len(found))
        return found[0] if found else None

    def _or_default(self, given: Any, collection: str, build: Callable[[], Any]) -> Any:
        if not is_default(given):
            return given
        found = self._get_first_op_from_collection(collection)
        if found is None:
            found = build()
            if found is not None:
                _v1.add_to_collection(collection, found)
        return found

    def _parts(self) -> dict[str, Any]:
        """The current values of the attributes, and of the properties that a subclass may override."""
        return {name.removeprefix("_"): self._part(name) for name in _PARTS}

    def _part(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            # A subclass has overridden this property, and sets the attributes that it needs only later.
            return getattr(self, f"_{name}")


def is_same(parts: Mapping[str, Any], others: Mapping[str, Any], names: Iterable[str] | None = None) -> bool:
    """Whether all parts are the same objects, or equal texts and numbers.

    Other parts are not compared by ``==``, because tensors overload it.
    """
    return all(
        parts[name] is others[name] or (isinstance(parts[name], (str, int, float)) and parts[name] == others[name])
        for name in (parts if names is None else names)
    )


def refuse_names(cls: type, names: list[str]) -> None:
    """Refuse a subclass that uses names which Stepguard needs for itself.

    Raises:
        TypeError: ``names`` is not empty.
    """
    if names:
        raise TypeError(
            f"{cls.__name__}: {', '.join(names)}: a Supervisor of Stepguard needs this name for itself, and cannot do "
            f"with another meaning; give the attribute or method of your class another name"
        )
