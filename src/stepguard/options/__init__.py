"""The options of a Supervisor, in groups that check themselves when they are made.

A Supervisor takes the options that people set every day as keywords of its own, and all options in groups. An option
has the same name in both forms, and may be given in only one of them. Each front door decorates its constructor with
:func:`each_option_once`, merges keywords and groups with :meth:`Options.of`, and hands the result to the core.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from datetime import datetime
from typing import Any, ParamSpec, TypeVar

from stepguard import stops
from stepguard.options.checks import (
    check_asked,
    check_best,
    check_choice,
    check_count,
    check_local,
    check_mirror,
    check_patterns,
    check_seconds,
    check_switch,
    check_text,
    is_url,
    wrong_type,
)

STOP = "stop"
RETURN = "return"
NUMBERS = "numbers"
BATCHES = "batches"
TRACES = (NUMBERS, BATCHES)


P = ParamSpec("P")
_GroupT = TypeVar("_GroupT", bound="_Group")


class _Group:
    """The base of the groups."""

    __slots__ = ("given",)
    given: frozenset[str]
    """The names of the options that were passed to the constructor."""

    # __new__, because the dataclass's __init__ cannot tell a default from a value that was passed.
    def __new__(cls, **given: Any) -> Any:
        group = object.__new__(cls)
        defaults = _defaults(cls)
        if given.keys() == defaults.keys():
            # dataclasses.replace passes every field: count only those that differ from the defaults as given.
            given = {name: value for name, value in given.items() if value != defaults[name]}
        object.__setattr__(group, "given", frozenset(given))
        return group

    def __reduce__(self) -> Any:
        """Rebuild a copy from the options that were given, so that ``given`` survives the copy."""
        return functools.partial(type(self), **{name: getattr(self, name) for name in self.given}), ()


def _defaults(kind: type[_Group]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving(_Group):
    """When the model is saved, under which name, and which checkpoints are kept.

    Args:
        save_model_secs: seconds between checkpoints; 0 or ``None`` turns the timer off.
        save_model_steps: steps between checkpoints, in addition to those on the timer; ``None`` saves by time only. A
            checkpoint that falls due while the last one is still being written is skipped.
        overhead: the part of the time that checkpoints may cost, such as 0.01, in addition to those by time and by
            steps: the next one is due when the measured cost of the last one is this part of the time since. The cost
            is the time by which training came less far: the stall, and how much slower steps are while it is written
            and uploaded. ``None`` saves by time and by steps only. The next three options are its bounds.
        min_interval_secs: at least so many seconds between two of these checkpoints.
        max_interval_secs: after so many seconds one is due whatever it costs and writes; ``None`` sets no such bound.
        max_bytes_per_day: at least so far apart that they write no more than this in a day; ``None`` sets no bound.
        save_at_end: whether the last step is saved when the run ends without an error. By default it is saved if
            ``save_model_secs``, ``save_model_steps`` or ``overhead`` is set.
        max_to_keep: how many checkpoints are kept; 0 or ``None`` keeps all. With TensorFlow, the Saver's own setting.
        keep_checkpoint_every_n_hours: one checkpoint of every N hours is kept in addition to ``max_to_keep``. With
            TensorFlow, the Saver's own setting.
        keep_best: ``("val_loss", "min", 3)`` keeps the 3 checkpoints with the smallest ``val_loss`` (``"max"``: the
            largest) in addition to ``max_to_keep``. The value comes from ``sess.metrics({"val_loss": ...})``, with
            TensorFlow ``sv.metrics(sess, {...})``; a step that is one of the best is saved then.
        on_commit: a function that is called after each commit, on a thread of its own, with what was committed: an
            object with ``path``, ``step``, ``metrics`` and ``names``. Its errors are warnings.
        frozen_apart: whether parameters that do not train get a file of their own in each checkpoint. A fine-tuning
            then writes only what it trains: the file of the frozen ones equals the one of the checkpoint before, and is
            not written again. For PyTorch.
        checkpoint_basename: the beginning of the names of the checkpoints.
        max_unprotected_secs: for how many seconds saves may fail, retries included, before the run stops.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    save_model_secs: float | None = 600
    save_model_steps: int | None = None
    overhead: float | None = None
    min_interval_secs: float = 2
    max_interval_secs: float | None = 600
    max_bytes_per_day: float | None = 5 * 10**12
    save_at_end: bool | None = None
    max_to_keep: int | None = 5
    keep_checkpoint_every_n_hours: float | None = None
    keep_best: tuple[str, str, int] | None = None
    on_commit: Callable[[Any], object] | None = None
    frozen_apart: bool = False
    checkpoint_basename: str = "model.ckpt"
    max_unprotected_secs: float = 1800

    def __post_init__(self) -> None:
        check_seconds("save_model_secs", self.save_model_secs, is_finite=True, or_none=True)
        check_count("save_model_steps", self.save_model_steps, least=1, or_none=True)
        self._check_overhead()
        check_switch("save_at_end", self.save_at_end, or_none=True)
        check_count("max_to_keep", self.max_to_keep, or_none=True)
        hours = self.keep_checkpoint_every_n_hours
        check_seconds("keep_checkpoint_every_n_hours", hours, unit="hours", is_positive=True, or_none=True)
        check_best(self.keep_best)
        if self.on_commit is not None and not callable(self.on_commit):
            raise wrong_type("on_commit", "a function of one argument, or None", self.on_commit)
        check_switch("frozen_apart", self.frozen_apart)
        check_text("checkpoint_basename", self.checkpoint_basename, "the name of a file such as 'model.ckpt'")
        check_seconds("max_unprotected_secs", self.max_unprotected_secs)

    def _check_overhead(self) -> None:
        check_seconds("overhead", self.overhead, unit="parts of the time", is_positive=True, or_none=True)
        if self.overhead is not None and self.overhead >= 1:
            raise ValueError(f"overhead must be a part of the time below 1, such as 0.01 for 1 %, got {self.overhead}")
        check_seconds("min_interval_secs", self.min_interval_secs, is_finite=True)
        check_seconds("max_interval_secs", self.max_interval_secs, is_positive=True, is_finite=True, or_none=True)
        most = self.max_bytes_per_day
        check_seconds("max_bytes_per_day", most, unit="bytes a day", is_positive=True, or_none=True)
        if self.max_interval_secs is not None and self.max_interval_secs < self.min_interval_secs:
            raise ValueError(
                f"max_interval_secs must be at least min_interval_secs={self.min_interval_secs:g}, got "
                f"{self.max_interval_secs:g}"
            )
        defaults = _defaults(type(self))
        for name in ("min_interval_secs", "max_interval_secs", "max_bytes_per_day"):
            if self.overhead is None and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} is a bound of overhead, which is not set: set both")

    @property
    def saves_last_step(self) -> bool:
        """Whether the last step is saved when the run ends without an error."""
        if self.save_at_end is None:
            return bool(self.save_model_secs or self.save_model_steps or self.overhead)
        return bool(self.save_at_end)

    @property
    def is_on(self) -> bool:
        """Whether anything is ever saved."""
        timed = self.save_model_secs or self.save_model_steps or self.overhead
        return bool(timed or self.saves_last_step or self.keep_best)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping(_Group):
    """How a run is stopped.

    Args:
        stop_grace_secs: how many seconds the threads have to stop, and the last checkpoint to be written.
        signals: the signals at which ``managed_session`` stops at the next step, saves that step, and ends the process
            by the signal: of ``signal.SIGTERM``, ``SIGUSR1``, ``SIGUSR2`` and ``SIGINT``. By default SIGTERM and
            SIGUSR1, the warning of some schedulers. A handler of the program itself is never replaced.
        stop_on_sigterm: ``False`` is short for ``signals=()``.
        after_secs: the run ends within this many seconds of a session: it is asked to stop, as by ``request_stop``, as
            long before as a step and the last save take, measured while it trains. The reason is ``time_limit``.
            ``None`` sets no limit.
        at: the same by the wall clock: Unix seconds, a ``datetime`` (one without a zone is local), or ``"slurm"`` for
            the end of the job in ``SLURM_JOB_END_TIME``, and no limit outside a job.
        exit_codes: the exit codes, 0 to 255, of a program whose run has ended, by words of the ledger: ``"finished"``,
            ``"stopped"`` for any request, or one of ``"sigterm"``, ``"sigusr1"``, ``"sigusr2"``, ``"interrupt"``,
            ``"request_stop"`` and ``"time_limit"``, and ``"error"``, which shows the traceback first. Without one, a
            signal ends the program as signals do, an error is raised, and otherwise the program continues below the
            block.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    stop_grace_secs: float = 120
    signals: Iterable[signal.Signals] = stops.DEFAULT_SIGNALS
    stop_on_sigterm: bool = True
    after_secs: float | None = None
    at: float | datetime | str | None = None
    exit_codes: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        check_seconds("stop_grace_secs", self.stop_grace_secs)
        object.__setattr__(self, "signals", stops.as_signals("signals", self.signals))
        check_switch("stop_on_sigterm", self.stop_on_sigterm)
        if not self.stop_on_sigterm and self.signals != stops.DEFAULT_SIGNALS:
            raise ValueError("stop_on_sigterm=False means signals=(): leave one of them out")
        check_seconds("after_secs", self.after_secs, is_positive=True, or_none=True)
        stops.check_end("at", self.at)
        if self.exit_codes is not None:
            stops.check_exit_codes("exit_codes", self.exit_codes)

    @property
    def stop_signals(self) -> tuple[signal.Signals, ...]:
        """The signals at which the run stops."""
        return tuple(self.signals) if self.stop_on_sigterm else ()

    def exit_code(self, reason: str) -> int | None:
        """The exit code of a run that has ended by ``reason``; ``None`` if none was chosen."""
        return stops.exit_code_of(self.exit_codes or {}, reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching(_Group):
    """How a run is watched, in addition to the ledger and the heartbeats in its logdir.

    Args:
        progress: whether to show a progress line where standard error is a terminal.
        total_steps: the step that the program trains to, shown by the progress line and ``stepguard status``; the run
            does not stop there. By default the number that the framework's session reports.
        save_summaries_secs: seconds between summaries and step rates; 0 or ``None`` writes neither.
        hang_secs: after this many seconds without a step boundary, the stacks of all threads are written to a file in
            ``logdir/stacks``. Choose more than the longest step, the first included. ``None`` turns the watch off.
        end_on_hang: whether a process that hangs is killed, so that ``stepguard run`` starts it again.
        trace: what is recorded of each step, to compare steps that are done again after a crash with the first time:
            ``"numbers"``, those that the program reports; ``"batches"``, also hyperparameters and digests of batches,
            random states and the state, which tell the cause of a difference; ``None`` records nothing.
        metrics_port: the port for ``/metrics``; 0 takes a free port, ``None`` serves no metrics.
        metrics_host: the address that metrics are served on; by default only this machine can reach it.
        peer_timeout_secs: after this many seconds of silence from a server that the graph needs, the session counts as
            lost and its runs raise UnavailableError; ``None`` waits for ever. For TensorFlow's remote masters.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    progress: bool = False
    total_steps: int | None = None
    save_summaries_secs: float | None = 120
    hang_secs: float | None = None
    end_on_hang: bool = False
    trace: str | None = "numbers"
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
        check_choice("trace", self.trace, *TRACES, None)
        check_count("metrics_port", self.metrics_port, most=65535, or_none=True)
        check_text("metrics_host", self.metrics_host, "an address such as '127.0.0.1'")
        check_seconds("peer_timeout_secs", self.peer_timeout_secs, or_none=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarding(_Group):
    """What happens when a loss, a summary or the state to be saved is not finite.

    Args:
        nan_guard: ``"stop"`` ends the run with a :class:`stepguard.NonFiniteError`; ``"return"`` restores the newest
            good checkpoint and continues with the next data, in a run of one process. ``None`` checks nothing.
        nan_returns: how many times a process returns before it stops instead; only with ``"return"``.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    nan_guard: str | None = None
    nan_returns: int = 3

    def __post_init__(self) -> None:
        check_choice("nan_guard", self.nan_guard, STOP, RETURN, None)
        check_count("nan_returns", self.nan_returns, least=1, what="returns")

    @property
    def returns(self) -> bool:
        """Whether the run returns to a good checkpoint instead of stopping."""
        return self.nan_guard == RETURN


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring(_Group):
    """How a start restores the run before it.

    Args:
        start_over_when_all_damaged: whether to begin at step 0 when checkpoints exist and none is good. By default
            that is an error, because starting over throws the run away.
        step: which checkpoint a start goes on from, instead of the newest: its step, ``"best"`` (see
            ``Saving(keep_best=...)``), or the name that ``sess.save(name=...)`` has given it, here or in the mirror. A
            run that saves puts the newer ones into ``aside/`` in its logdir, once: its later starts with the same value
            go on with the newest.
        hyperparameters: which side wins when the learning rate, weight decay or schedule of the program differs from
            the checkpoint's: ``"checkpoint"``, so that the run continues unchanged, or ``"program"``. A warning names
            the difference in either case. For PyTorch.
        only: the names of the parts of the state to restore, or patterns such as ``"model*"``. At each start the other
            parts keep the values that the program gave them. By default every part is restored. For PyTorch and JAX,
            like the options that follow.
        leave_out: patterns for parameters and buffers, such as ``"model.head.*"``, that are not restored: at each start
            they keep the values that the program gave them.
        init_from: the first weights of a run that has no checkpoint yet: the logdir or a checkpoint of another run, a
            file with a plain ``state_dict``, for JAX a checkpoint of Orbax's, or a mapping from names of parts to such
            paths.
        init_fit: ``"whole"`` if these weights must fit the model exactly, ``"part"`` to load the weights that fit.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    start_over_when_all_damaged: bool = False
    step: int | str | None = None
    hyperparameters: str = "checkpoint"
    only: Sequence[str] | None = None
    leave_out: Sequence[str] = ()
    init_from: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None
    init_fit: str = "whole"

    def __post_init__(self) -> None:
        check_switch("start_over_when_all_damaged", self.start_over_when_all_damaged)
        check_asked(self.step)
        check_choice("hyperparameters", self.hyperparameters, "checkpoint", "program")
        check_patterns("only", self.only, or_none=True)
        check_patterns("leave_out", self.leave_out)
        if not isinstance(self.init_from, (str, os.PathLike, Mapping, type(None))):
            raise wrong_type("init_from", "a path, a mapping of paths, or None", self.init_from)
        places = self.init_from.values() if isinstance(self.init_from, Mapping) else [self.init_from]
        for place in places:
            if isinstance(place, (str, os.PathLike)):
                check_local("init_from", place)
        check_choice("init_fit", self.init_fit, "whole", "part")


@dataclass(frozen=True, slots=True)
class Mirror:
    """A second copy of a run, in an object store or in another directory.

    Each committed checkpoint is copied there by a thread of its own, for which training never waits; ledger, event
    files and heartbeats go along. A start takes the newest good checkpoint of logdir and mirror.

    Args:
        url: an address such as ``s3://bucket/runs/x``, ``gs://bucket/runs/x`` or ``az://container/runs/x``, or a
            directory. Each run needs one of its own.
        keep: how many checkpoints are kept there, the newest; 0 or ``None`` keeps all. The last good one always stays.
        max_bytes_per_sec: how many bytes are sent in a second at most; ``None`` sets no bound.
        check: which checkpoints in the mirror a start reads to their ends, while the program trains: ``"newest"``,
            ``"all"``, or ``None``; of the others the sizes are compared. What differs is sent again.
        lease_secs: after so many seconds without a sign of life from the machine that trains into this mirror, another
            machine may go on with the run.
        store_options: options of the store, by obstore's names, such as ``{"endpoint": ..., "region": ...}``. What they
            do not say comes from the environment. Credentials belong there, and not here.

    Raises:
        TypeError, ValueError: an option is of the wrong type or value; the message names it.
    """

    url: str | os.PathLike[str]
    _: KW_ONLY
    keep: int | None = 5
    max_bytes_per_sec: float | None = None
    check: str | None = "newest"
    lease_secs: float = 60
    store_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_mirror(self.url)
        check_count("keep", self.keep, what="checkpoints", or_none=True)
        most = self.max_bytes_per_sec
        check_seconds("max_bytes_per_sec", most, unit="bytes a second", is_positive=True, or_none=True)
        check_choice("check", self.check, "newest", "all", None)
        check_seconds("lease_secs", self.lease_secs, is_positive=True, is_finite=True)
        if not isinstance(self.store_options, (Mapping, type(None))):
            raise wrong_type("store_options", "a mapping of obstore's options or None", self.store_options)


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
    mirror: Mirror | None = None

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Merge what a front door was given: its flat keywords, each group or ``None``, and the mirror or its address.

        An option that was given in its group is taken from the group; see :func:`each_option_once`.

        Raises:
            TypeError, ValueError: an option, or a group, is of the wrong type or value; the message names it.
        """
        groups: dict[str, Any] = {keyword: _merged(keyword, kind, given) for keyword, kind in _GROUPS.items()}
        mirror = given.get("mirror")
        if mirror is not None and not isinstance(mirror, Mirror):
            mirror = Mirror(mirror)
        return cls(**groups, mirror=mirror)

    def check_mirror(self, *, commits: bool, logdir: str | os.PathLike[str] | None) -> None:
        """Raise unless there is something to mirror; ``commits`` says whether the run commits checkpoints to a logdir.

        Raises:
            ValueError: nothing is saved, or the mirror is the logdir itself, or inside it.
        """
        mirror = self.mirror
        if mirror is None:
            return
        if not (commits and self.saving.is_on):
            raise ValueError(
                f"mirror={os.fspath(mirror.url)!r} is a second copy of what is saved, and nothing is: it needs a "
                f"logdir on this machine's file systems, and save_model_secs, save_model_steps, overhead or save_at_end"
            )
        if logdir is not None and not is_url(mirror.url):
            place, root = os.path.realpath(mirror.url), os.path.realpath(logdir)
            if os.path.commonpath([place, root]) == root:
                raise ValueError(f"mirror={os.fspath(mirror.url)!r} is in the logdir {root}: give another directory")

    def check_return(self, *, commits: bool) -> None:
        """Raise unless the NaN guard has checkpoints to return to; ``commits`` says whether the run commits any.

        Raises:
            ValueError: ``nan_guard`` is ``"return"``, and nothing is saved.
        """
        if self.guarding.returns and not (commits and self.saving.is_on):
            raise ValueError(
                "nan_guard='return' needs checkpoints to return to: a chief with a logdir on this machine's file "
                "systems, and save_model_secs, save_model_steps, overhead or save_at_end; use nan_guard='stop' without "
                "them"
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
    """Decorate a front door's constructor: raise TypeError for an option given both as a keyword and in its group."""
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
    """Refuse the options ``names``, which an engine cannot honour, instead of accepting and ignoring them.

    Raises:
        ValueError: ``group`` was given one of them.
    """
    for name in names:
        if group is not None and name in group.given:
            raise ValueError(f"{type(group).__name__}({name}={getattr(group, name)!r}): {because}")
