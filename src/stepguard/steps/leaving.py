"""How the body of a loop was left: by `break` or by an error. Python closes the loop's iterator alike in both cases.

What differs is the instruction at which the frame of the loop stands: `break` and `return` are instructions that drop
the iterator, and an error leaves the frame at the instruction that has raised it.
"""

from __future__ import annotations

import dis
import inspect
import types

_DROPS = ("POP_", "END_FOR", "RETURN_", "STORE_", "DELETE_")


def is_by_error(frame: types.FrameType | None) -> bool:
    """Whether an error has left the loop; ``frame`` is the one that its iterator was closed from."""
    # Generators around the iterator, such as that of tqdm, are closed at their own `yield`.
    while (
        frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR and _at(frame) in ("YIELD_VALUE", "RESUME")
    ):
        frame = frame.f_back
    return frame is not None and not _at(frame).startswith(_DROPS)


def _at(frame: types.FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] if frame.f_lasti >= 0 else ""
