"""The options of a Supervisor, in groups that check themselves when they are made.

A Supervisor takes what is set every day as keywords of its own, and the groups besides. An option has one name in both,
and may be given in one of them. Each front door decorates its constructor with :func:`each_option_once`, merges the two
with :meth:`Options.of`, and hands the result to the core.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ParamSpec, TypeVar

STOP = "stop"
RETURN = "return"

P = ParamSpec("P")
_GroupT = TypeVar("_GroupT", bound="_Group")


class _Group:
    """The base of the groups: it knows which options were named when it was made."""

    __slots__ = ("given",)
    given: frozenset[str]

    # The fields' own constructor, the dataclass's, sees the defaults and what was given alike.
    def __new__(cls, **given: Any) -> Any:
        group = object.__new__(cls)
        defaults = _defaults(cls)
        if given.keys() == defaults.keys():
            # dataclasses.replace names every field; what differs from the defaults was meant.
            given = {name: value for name, value in given.items() if value != defaults[name]}
        object.__setattr__(group, "given", frozenset(given))
        return group

    def __reduce__(self) -> Any:
        """A copy was given what this one was."""
        return functools.partial(type(self), **{name: getattr(self, name) for name in self.given}), ()


def _defaults(kind: type[_Group]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving(_Group):
    """When the model is saved, under which name, and what is kept.

    Args:
        save_model_secs: seconds between checkpoints; 0 or ``None`` takes none on a timer.
        save_model_steps: steps between checkpoints, besides those on the timer; ``None`` takes none by steps. One that
            falls due while the last is still being written is skipped.
        save_at_end: whether the last step is saved when the run ends without an error. By default it is when
            ``save_model_secs`` or ``save_model_steps`` asks for checkpoints at all.
        max_to_keep: how many checkpoints are kept; 0 or ``None`` keeps all. With TensorFlow this is the Saver's.
        keep_checkpoint_every_n_hours: of those that are not kept, one for each so many hours stays. With TensorFlow
            this is the Saver's.
        checkpoint_basename: what the names of the checkpoints begin with.
        max_unprotected_secs: how long saves may fail, in seconds, with retries, before that stops the run.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    save_model_secs: float | None = 600
    save_model_steps: int | None = None
    save_at_end: bool | None = None
    max_to_keep: int | None = 5
    keep_checkpoint_every_n_hours: float | None = None
    checkpoint_basename: str = "model.ckpt"
    max_unprotected_secs: float = 1800

    def __post_init__(self) -> None:
        check_seconds("save_model_secs", self.save_model_secs, is_finite=True, or_none=True)
        check_count("save_model_steps", self.save_model_steps, least=1, or_none=True)
        check_switch("save_at_end", self.save_at_end, or_none=True)
        check_count("max_to_keep", self.max_to_keep, or_none=True)
        hours = self.keep_checkpoint_every_n_hours
        check_seconds("keep_checkpoint_every_n_hours", hours, unit="hours", is_positive=True, or_none=True)
        _check_text("checkpoint_basename", self.checkpoint_basename, "the name of a file such as 'model.ckpt'")
        check_seconds("max_unprotected_secs", self.max_unprotected_secs)

    @property
    def saves_last_step(self) -> bool:
        """Whether the last step is saved when the run ends without an error."""
        if self.save_at_end is None:
            return bool(self.save_model_secs or self.save_model_steps)
        return bool(self.save_at_end)

    @property
    def is_on(self) -> bool:
        """Whether anything is ever saved."""
        return bool(self.save_model_secs or self.save_model_steps or self.saves_last_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping(_Group):
    """How a run is stopped.

    Args:
        stop_grace_secs: how long, in seconds, threads may take to stop, and the last checkpoint to be written.
        stop_on_sigterm: whether ``managed_session`` answers SIGTERM with a stop at the next step, a last checkpoint
            and an end by that signal; a handler of the program's own is left alone in any case.
        exit_code: what the program ends with, from 0 to 255, when its run was asked to stop, by SIGTERM, Ctrl-C or
            ``request_stop``, and has stopped well: for a scheduler that starts it again then. By default a signal ends
            it as signals do, and after ``request_stop`` it goes on below the block.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    stop_grace_secs: float = 120
    stop_on_sigterm: bool = True
    exit_code: int | None = None

    def __post_init__(self) -> None:
        check_seconds("stop_grace_secs", self.stop_grace_secs)
        check_count("exit_code", self.exit_code, most=255, or_none=True)
        check_switch("stop_on_sigterm", self.stop_on_sigterm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching(_Group):
    """How a run is watched while it lasts, besides the ledger and the heartbeats in its logdir.

    Args:
        progress: whether to show a progress line where standard error is a terminal.
        total_steps: the step that the program trains to, for the progress line and ``stepguard status``; nothing is
            stopped there. By default what the framework's session knows of it.
        save_summaries_secs: seconds between summaries and step rates; 0 or ``None`` writes neither.
        hang_secs: seconds without a step boundary after which the stacks of all threads are written to a file in
            ``logdir/stacks``; more than the longest step, the first included. ``None`` does not watch.
        end_on_hang: whether the process is then killed, so that ``stepguard run`` starts it again.
        metrics_port: the port for ``/metrics``; 0 takes a free one, ``None`` serves none.
        metrics_host: the address to serve it on; by default this machine alone can reach it.
        peer_timeout_secs: how long a server that the graph needs may be silent, in seconds, before the session counts
            as lost and its runs raise UnavailableError; ``None`` waits for ever. For TensorFlow's remote masters.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    progress: bool = False
    total_steps: int | None = None
    save_summaries_secs: float | None = 120
    hang_secs: float | None = None
    end_on_hang: bool = False
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    peer_timeout_secs: float | None = 60

    def __post_init__(self) -> None:
        check_switch("progress", self.progress)
        check_count("total_steps", self.total_steps, or_none=True)
        check_seconds("save_summaries_secs", self.save_summaries_secs, is_finite=True, or_none=True)
        check_seconds("hang_secs", self.hang_secs, is_positive=True, is_finite=True, or_none=True)
        check_switch("end_on_hang", self.end_on_hang)
        if self.end_on_hang and self.hang_secs is None:
            raise ValueError("end_on_hang needs hang_secs: the seconds without a step that count as a hang")
        check_count("metrics_port", self.metrics_port, most=65535, or_none=True)
        _check_text("metrics_host", self.metrics_host, "an address such as '127.0.0.1'")
        check_seconds("peer_timeout_secs", self.peer_timeout_secs, or_none=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarding(_Group):
    """What happens when a loss, a summary or the state to be saved is not finite.

    Args:
        nan_guard: ``"stop"`` ends the run with a :class:`stepguard.NonFiniteError`; ``"return"`` puts the model back to
            the newest good checkpoint, and goes on with the data that comes next, in a run of one process. ``None``
            looks at nothing.
        nan_returns: how often, at most, a process returns before it stops all the same; with ``"return"`` only.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    nan_guard: str | None = None
    nan_returns: int = 3

    def __post_init__(self) -> None:
        _check_choice("nan_guard", self.nan_guard, STOP, RETURN, None)
        check_count("nan_returns", self.nan_returns, least=1, what="returns")

    @property
    def returns(self) -> bool:
        """Whether the run goes back to a good checkpoint."""
        return self.nan_guard == RETURN


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring(_Group):
    """How a run comes back.

    Args:
        start_over_when_all_damaged: whether to begin at step 0 when checkpoints exist and none is good. By default
            that is an error, since it throws the run away.
        hyperparameters: who wins where the program sets another learning rate, weight decay or schedule than the run
            before: the ``"checkpoint"``, so that the run goes on as it was, or the ``"program"``. The difference is
            said in either case. For PyTorch, like the options that follow.
        only: the names of the parts of the state that are restored, or patterns such as ``"model*"``; the others begin
            as the program has made them, at each start. By default all are.
        leave_out: patterns for the parameters and buffers that begin as the program has made them, at each start, such
            as ``"model.head.*"``.
        init_from: where a run without a checkpoint of its own takes its first weights from: the logdir or a checkpoint
            of another run, or a file with a plain ``state_dict``; or a mapping of such, by the names of the parts.
        init_fit: ``"whole"``, when these weights have to fit the model exactly, or ``"part"``, when what fits is taken.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    start_over_when_all_damaged: bool = False
    hyperparameters: str = "checkpoint"
    only: Sequence[str] | None = None
    leave_out: Sequence[str] = ()
    init_from: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None
    init_fit: str = "whole"

    def __post_init__(self) -> None:
        check_switch("start_over_when_all_damaged", self.start_over_when_all_damaged)
        _check_choice("hyperparameters", self.hyperparameters, "checkpoint", "program")
        _check_patterns("only", self.only, or_none=True)
        _check_patterns("leave_out", self.leave_out)
        if not isinstance(self.init_from, (str, os.PathLike, Mapping, type(None))):
            raise wrong_type("init_from", "a path, a mapping of paths, or None", self.init_from)
        _check_choice("init_fit", self.init_fit, "whole", "part")


_GROUPS: dict[str, type[_Group]] = {
    "saving": Saving,
    "stopping": Stopping,
    "watching": Watching,
    "guarding": Guarding,
    "restoring": Restoring,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """All options of one Supervisor."""

    saving: Saving
    stopping: Stopping
    watching: Watching
    guarding: Guarding
    restoring: Restoring

    @classmethod
    def of(cls, **given: Any) -> Options:
        """The options of a front door, from what it was given: its flat keywords, and groups or ``None``.

        An option that was named in its group is taken from there; see :func:`each_option_once`.

        Raises:
            TypeError, ValueError: an option, or a group, is of the wrong type or value; the message names it.
        """
        groups: dict[str, Any] = {keyword: _merged(keyword, kind, given) for keyword, kind in _GROUPS.items()}
        return cls(**groups)

    def check_return(self, *, commits: bool) -> None:
        """Check that there is something to return to; ``commits`` says whether checkpoints have a place.

        Raises:
            ValueError: the guard is to return, and nothing is saved.
        """
        if self.guarding.returns and not (commits and self.saving.is_on):
            raise ValueError(
                "nan_guard='return' needs checkpoints to return to: a chief with a logdir on this machine's file "
                "systems, and save_model_secs, save_model_steps or save_at_end; use nan_guard='stop' without them"
            )


def _merged(keyword: str, kind: type[_GroupT], given: dict[str, Any]) -> _GroupT:
    group = given.get(keyword)
    if group is None:
        group = kind()
    elif not isinstance(group, kind):
        raise wrong_type(keyword, f"a stepguard.{kind.__name__} or None", group)
    flat = {name: given[name] for name in _defaults(kind).keys() & given.keys() - group.given}
    merged: _GroupT = replace(group, **flat)  # type: ignore[type-var]
    return merged


def each_option_once(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a front door's constructor: an option given flat and in its group is a TypeError that names both."""
    parameters = list(inspect.signature(init).parameters)

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        for keyword, kind in _GROUPS.items():
            group = given.get(keyword)
            for name in sorted(group.given & given.keys()) if isinstance(group, kind) else ():
                raise TypeError(
                    f"{name} is given twice: as {name}={given[name]!r}, and in {keyword}={kind.__name__}({name}="
                    f"{getattr(group, name)!r}); leave one of them out"
                )
        init(*args, **kwargs)

    return checked


def refuse(group: _Group | None, *names: str, because: str) -> None:
    """Refuse options that an engine has no use for, if ``group`` was given one of them: none is accepted and ignored.

    Raises:
        ValueError: it was.
    """
    for name in names:
        if group is not None and name in group.given:
            raise ValueError(f"{type(group).__name__}({name}={getattr(group, name)!r}): {because}")


def check_switch(name: str, value: object, *, or_none: bool = False) -> None:
    """Raise unless ``value`` is a switch: what is merely true, such as the text ``"no"``, is a mistake.

    Raises:
        TypeError: it is none; the message names the option, what was expected and what was found.
    """
    # A bool of NumPy is named like that too, and is what `ranks == 0` gives.
    is_switch = type(value).__name__ in ("bool", "bool_") or (isinstance(value, int) and value in (0, 1))
    if is_switch or (or_none and value is None):
        return
    raise wrong_type(name, "True, False or None" if or_none else "True or False", value)


def check_seconds(
    name: str,
    value: Any,
    *,
    unit: str = "seconds",
    least: float = 0,
    is_positive: bool = False,
    is_finite: bool = False,
    or_none: bool = False,
) -> None:
    """Raise unless ``value`` is a number of seconds, or of another ``unit``: no NaN, and at least ``least``.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if value is None and or_none:
        return
    bound = "" if least == -math.inf else " > 0" if is_positive else f" >= {least:g}"
    expected = f"a {'finite ' if is_finite else ''}number of {unit}{bound}{' or None' if or_none else ''}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, expected, value)
    number = float(value)
    in_range = number > 0 if is_positive else number >= least
    if not in_range or (is_finite and math.isinf(number)):
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_count(
    name: str, value: Any, *, what: str = "", least: int = 0, most: int | None = None, or_none: bool = False
) -> None:
    """Raise unless ``value`` is a whole number, of ``what``, from ``least`` to ``most``.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.
    """
    if value is None and or_none:
        return
    bound = f" >= {least}" if most is None else f" from {least} to {most}"
    expected = f"{f'a number of {what}' if what else 'a whole number'}{bound}{' or None' if or_none else ''}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong_type(name, expected, value)
    if int(value) < least or (most is not None and int(value) > most):
        raise ValueError(f"{name} must be {expected}, got {value}")


def wrong_type(name: str, expected: str, found: object) -> TypeError:
    """The error for an argument that is not what it must be."""
    return TypeError(f"{name} must be {expected}, got {type(found).__name__}: {found!r:.80}")


def _check_text(name: str, value: object, expected: str) -> None:
    if not isinstance(value, str):
        raise wrong_type(name, expected, value)
    if not value:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check_choice(name: str, value: object, *choices: object) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in choices):
        *first, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r:.80}")


def _check_patterns(name: str, value: Any, *, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    # A single text is a sequence too, of letters.
    is_sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_sequence or not all(isinstance(one, str) and one for one in value):
        raise wrong_type(name, f"a sequence of names such as ('model',){' or None' if or_none else ''}", value)
