"""Whether a step takes an attribute over from the step before, as far as the code of the program tells.

A step that notes its last loss sets the attribute anew, and a restart loses nothing. One that adds to an average reads
it first. The byte code of the methods has both, in their order. What it leaves open is taken for neither.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator

from stepguard.steps.strangers import program_frames

LIBRARIES = {"torch", "builtins", "typing", "abc"}

_LOADS = {"LOAD_ATTR", "LOAD_METHOD"}
_COPIES = {"COPY", "DUP_TOP"}
_SWAPS = {"SWAP", "ROT_TWO"}
# A value that goes into one of these is not only part of a condition.
_ENDS = ("STORE", "POP_TOP", "RETURN", "YIELD")
_JUMPS = ("POP_JUMP", "JUMP_IF")
_ADDERS = {"append", "extend"}

_LOAD, _TEST, _UPDATE, _STORE, _STORE_FOR_SURE = "load", "test", "update", "store", "store for sure"


def is_carried(kind: type, name: str) -> bool:
    """Whether a method of ``kind`` computes the new value of the attribute with the old one."""
    return any(_reads_first(uses) and _LOAD in uses and _STORE in _after(uses, _LOAD) for uses in _uses_in(kind, name))


def is_set_anew(kind: type, name: str, around: Iterable[types.CodeType]) -> bool:
    """Whether the methods of ``kind`` set the attribute before they read it, or read it for nothing but to add to it.

    ``around`` is the code that may use the object: the loop may decide something by the attribute.
    """
    found = _uses_in(kind, name)
    if not any(_STORE in uses or _UPDATE in uses for uses in found) or any(_reads_first(uses) for uses in found):
        return False
    outside = [uses for code in around if (uses := _uses_of(code, name, of_others=True))]
    if any(_UPDATE in uses for uses in found):
        return not outside and not any(_LOAD in uses or _TEST in uses for uses in found)
    return not any(_TEST in uses or _STORE in uses or _UPDATE in uses for uses in outside)


def codes_around(frame: types.FrameType, kinds: Iterable[type]) -> Iterator[types.CodeType]:
    """The code around the loop that ``frame`` was called by, and in the modules of it, without that of ``kinds``."""
    inside = {code for kind in kinds for one in methods(kind) for code in _with_inner(one.__code__)}
    frames = list(program_frames(frame))
    modules = {id(one.f_globals): one.f_globals for one in frames}
    held = [one for module in modules.values() for one in list(module.values())]
    functions = [one for one in held if isinstance(one, types.FunctionType)]
    functions += [one for kind in held if isinstance(kind, type) for one in methods(kind)]
    found = {*(one.f_code for one in frames), *(one.__code__ for one in functions)}
    yield from {code for one in found for code in _with_inner(one)} - inside


def methods(kind: type) -> Iterator[types.FunctionType]:
    """The methods of the program's classes that ``kind`` is made of."""
    bases = [one for one in kind.__mro__ if str(one.__module__).partition(".")[0] not in LIBRARIES]
    for one in (one for base in bases for one in vars(base).values()):
        function = one.fget if isinstance(one, property) else getattr(one, "__func__", one)
        function = inspect.unwrap(function) if callable(function) else None
        if isinstance(function, types.FunctionType):
            yield function


@functools.lru_cache(maxsize=1000)
def _uses_in(kind: type, name: str) -> list[tuple[str, ...]]:
    """What each method does with the attribute, in the order of its code. Constructors are left out."""
    codes = [one.__code__ for one in methods(kind) if one.__name__ not in ("__init__", "__post_init__")]
    return [uses for one in codes for code in _with_inner(one) if (uses := _uses_of(code, name))]


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _with_inner(part)


def _uses_of(code: types.CodeType, name: str, *, of_others: bool = False) -> tuple[str, ...]:
    """The uses in their order; with ``of_others`` not those of the object whose method the code may be."""
    # As a text, it is that of `getattr`.
    found = [_TEST] if name in code.co_consts and not of_others else []
    if name in code.co_names:
        own = code.co_varnames[0] if of_others and code.co_argcount else None
        found += _read(list(dis.get_instructions(code)), name, own)
    return tuple(found)


def _read(code: list[dis.Instruction], name: str, own: str | None) -> Iterator[str]:
    skipped_to = 0
    for index, one in enumerate(code):
        if one.opcode in dis.hasjrel or one.opcode in dis.hasjabs:
            skipped_to = max(skipped_to, int(one.argval))
        if one.argval != name or (own == "self" and _is_of(own, code[max(index - 2, 0) : index])):
            continue
        if one.opname == "STORE_ATTR":
            yield _STORE
            if one.offset >= skipped_to:
                yield _STORE_FOR_SURE
        elif one.opname in _LOADS:
            after = code[index + 1]
            is_update = code[index - 1].opname in _COPIES or (after.opname in _LOADS and after.argval in _ADDERS)
            yield _UPDATE if is_update else _TEST if _is_condition(code[index + 1 :]) else _LOAD


def _is_of(own: str, before: list[dis.Instruction]) -> bool:
    """Whether the attribute is of the variable ``own``, which is loaded just before, perhaps to be copied."""
    if before and before[-1].opname in _SWAPS:
        return True  # The attribute is set to a sum; the sum itself tells whose attribute it is.
    if before and before[-1].opname in _COPIES:
        before = before[:-1]
    found = before[-1].argval if before else None
    return found == own or (isinstance(found, tuple) and found[-1] == own)


def _is_condition(behind: list[dis.Instruction]) -> bool:
    for one in behind:
        if one.opname.startswith(_JUMPS):
            return True
        if one.opname.startswith(_ENDS):
            return False
    return False


def _reads_first(uses: tuple[str, ...]) -> bool:
    before = uses[: uses.index(_STORE_FOR_SURE)] if _STORE_FOR_SURE in uses else uses
    return _LOAD in before or _TEST in before


def _after(uses: tuple[str, ...], use: str) -> tuple[str, ...]:
    return uses[uses.index(use) + 1 :]
