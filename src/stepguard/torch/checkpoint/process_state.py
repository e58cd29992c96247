"""The state of one process in a checkpoint of PyTorch; see :mod:`stepguard.steps.process_file`."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

from stepguard.disk.schema import Count, Each, Fields, Form
from stepguard.errors import CheckpointCorruptError, described
from stepguard.steps.process_file import checked_state
from stepguard.torch.checkpoint.files import read_file
from stepguard.torch.checkpoint.of_rank import BEGUN, OWN, SAMPLED
from stepguard.torch.random_states import STREAMS

_TEXTS = Each((str,))
_BY_NAME = Each((object,), (str,))
# What `Program.notes`, the session and the engine add to the state of a process.
ADDED: dict[str, Form] = {
    "program": Fields(
        {"frozen": _TEXTS},
        {
            "parameters": Each(Each(Each((str, NoneType))), (str,)),
            "settings": Each(_BY_NAME, (str,)),
            "frozen as built": _TEXTS,
            "built": Each(_TEXTS, (str,)),
            "added": Each(_TEXTS, (str,)),
            "attributes": Fields(
                {},
                {
                    "changed": Each(Each((object,), length=2), (str,)),
                    "tensors": _TEXTS,
                    "contents": Each((str,), (str,)),
                },
            ),
        },
    ),
    "iterators": Each(Fields({"data": (str,), "batches": Count(), "is_ahead": (bool,)})),
    "reordered": Each((str,), (str,)),
    "modes": Each((bool,), (str,)),
    "sharded": _BY_NAME,
    "own": Each(_BY_NAME, (str,)),
    "unnamed": Each(Fields({"number": Count(), "began": Each((object,), (str,)), "now": Each((object,), (str,))})),
    "built": Each(_TEXTS, (str,)),
    "numpys": Each((str,), (str,)),
    "generators": Each(_BY_NAME, (str,)),
    OWN: Fields({"buffers": Each(_BY_NAME, (str,)), "streams": Each((dict,), (str,))}),
    "computed": _BY_NAME,
    SAMPLED: Each(Each((str,), (str,)), (str,)),
    BEGUN: Each(Each((str,), (str,)), (str,)),
    "gradients": Each(Each((object,), Count()), (str,)),
}


def read_process(path: Path, place: Path | None = None) -> dict[str, Any]:
    """Read the file of a process at ``path``, or at the ``place`` that holds it open.

    Raises:
        CheckpointCorruptError: it cannot be read, or holds something else.
        CheckpointError: it holds something that could run code; nothing in it was used.
        OSError: the system cannot read it.
    """
    try:
        found = read_file(place or path)
    except (RuntimeError, EOFError, LookupError, ValueError) as error:
        raise CheckpointCorruptError(
            f"{path}: expected the state of a process, found a file that PyTorch cannot read ({described(error)})",
            path=path,
        ) from error
    return checked_state(found, path, STREAMS, ADDED)
