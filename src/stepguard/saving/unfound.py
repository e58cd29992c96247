"""What ``Restoring`` names, and is not there."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stepguard.words import listed, logger

_log = logger(__name__)


def warn_of_unmatched(
    option: str,
    patterns: Sequence[str] | None,
    names: Iterable[str],
    matches: Callable[[str, str], bool] = fnmatch.fnmatchcase,
) -> None:
    """Warn of ``patterns`` that match none of the ``names``; ``matches`` gets a name and a pattern."""
    known = list(dict.fromkeys(names))
    unmatched = [one for one in patterns or () if not any(matches(name, one) for name in known)]
    if unmatched:
        _log.warning(
            "Restoring(%s=...): expected patterns of names such as %s, found %s, which match nothing and have no "
            "effect: correct them, or take them out",
            option,
            listed(known),
            listed(map(repr, unmatched)),
        )


@contextmanager
def first_weights_at(place: Path) -> Iterator[None]:
    """A block that reads the weights at ``place``; its FileNotFoundError names the option."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"init_from: expected a logdir, a checkpoint or a file of weights, found none at {place}: {error}"
        ) from error
