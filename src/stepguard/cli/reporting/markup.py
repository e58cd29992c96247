"""Elements of HTML. A text that is put into one is escaped, whoever wrote it; only another element is not."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from stepguard.words import printable

_LONGEST_TEXT = 2000


class Markup(str):
    """HTML that was made here."""

    __slots__ = ()


def element(name: str, *content: str, **attributes: str) -> Markup:
    """An element with its content. Underlines at the end of the names of attributes are left out (``class_``)."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{given}>{joined(content)}</{name}>")


def joined(content: Iterable[str]) -> Markup:
    """Elements and texts one after the other."""
    return Markup("".join(map(_escaped, content)))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> Markup:
    """A table that can be scrolled aside where it is too wide. The columns ``numbers`` are aligned to the right."""
    kinds = [{"class_": "number"} if column in numbers else {} for column in range(len(titles))]
    head = element("tr", *(element("th", title, **kind) for title, kind in zip(titles, kinds, strict=True)))
    body = [
        element("tr", *(element("td", cell, **kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows
    ]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="table")


def coloured(text: str, kind: str) -> Markup:
    """A text in the colour of "good", "bad", "trouble" or "plain"."""
    return element("span", text, class_=kind)


def _escaped(text: str) -> str:
    if isinstance(text, Markup):
        return text
    text = printable(text)
    return html.escape(text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…")
