"""The generators of random numbers that a function which makes batches holds: in its closure, its object or by name."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stepguard.steps.attributes import attributes
from stepguard.steps.feeds import FunctionFeed
from stepguard.steps.process_file import taking
from stepguard.steps.random_streams import RandomStreams
from stepguard.steps.strangers import state_of_generator


class HoldingFunctionFeed(FunctionFeed):
    """Saves these generators with the position: as they were when the epoch began, and as they are.

    The seen batches are read again from the first state. The second is set then, because the steps may have drawn too.
    ``put_back`` has, by identity, the generators that another feed of this session has set: they are further by now.
    """

    def __init__(self, loader: Any, streams: RandomStreams, put_back: dict[int, Any]) -> None:
        super().__init__(loader, streams)
        self._put_back = put_back
        self._held = list({id(one): one for one in _held_by(loader) if state_of_generator(one) is not None}.values())
        self._before: list[Any] | None = None
        self._saved: list[Any] | None = None

    def position(self) -> dict[str, Any]:
        """The position, with the states of the generators."""
        position = super().position()
        if self._held:
            now = [_state(one) for one in self._held]
            is_read = self._saved is None  # Until the seen batches are read again, the generators are not there yet.
            position["generators"] = [self._before, now if is_read else self._saved]
        return position

    def resume(self, position: Mapping[str, Any], processes: int = 1, *, is_checked: bool = True) -> None:
        """Begin at ``position``."""
        with taking("the generators of a function that makes batches"):
            self._before, now = position.get("generators") or (None, None)
        if position["batches"]:
            self._saved = now
        elif now is not None:
            self._go_on_from(now)
        super().resume(position, processes, is_checked=is_checked)

    def catch_up(self, go_on: Callable[[], bool]) -> bool:
        """Read the seen batches again."""
        live = [_state(one) for one in self._held]
        is_there = super().catch_up(go_on)
        if self._saved is not None:
            self._put(live)
            if is_there:
                self._go_on_from(self._saved)
                self._saved = None
        return is_there

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        if skip and self._before is not None:
            self._put(self._before)
        else:
            self._before = [_state(one) for one in self._held]
        return super()._begin_epoch(skip)

    def _go_on_from(self, states: list[Any]) -> None:
        is_known = [id(one) in self._put_back for one in self._held]
        now = [_state(one) for one in self._held]
        self._put([mine if known else one for known, mine, one in zip(is_known, now, states, strict=False)])
        self._put_back.update({id(one): one for one in self._held})

    def _put(self, states: list[Any]) -> None:
        for one, state in zip(self._held, states, strict=False):
            with taking(f"a {type(one).__name__} in the data"):
                _put(one, state)


def _held_by(function: Any) -> Iterator[Any]:
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values(), *_held_by(function.func))
        return
    if isinstance(function, types.MethodType):
        yield from attributes(function.__self__).values()
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        return
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield from (function.__globals__.get(name) for name in function.__code__.co_names)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # The variable has no value yet.
            continue


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    holder = getattr(generator, "bit_generator", None)
    return _plain(generator.get_state(legacy=False) if holder is None else holder.state)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _put(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        version, internal, gauss_next = state
        generator.setstate((version, tuple(internal), gauss_next))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
