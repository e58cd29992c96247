"""Our docstrings are read in terminals and editors too: what they have of reStructuredText becomes Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|mod|attr|exc):`~?([^`]+)`")
_LITERAL_BLOCK = re.compile(r"^ *::$\n?", re.MULTILINE)


class PlainRoles(griffe.Extension):
    """Roles become code, and the two colons before a literal block go: it is indented already."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object whose docstring was read."""
        if obj.docstring is not None:
            obj.docstring.value = _LITERAL_BLOCK.sub("", _ROLE.sub(r"`\1`", obj.docstring.value))
