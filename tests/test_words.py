"""How lists and spans of time are put into words."""

from __future__ import annotations

import pytest

from stepguard.words import duration, listed


@pytest.mark.parametrize(
    ("secs", "text"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5900, "98 min"),
        (7500, "2 h 05 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_are_short(secs: float, text: str) -> None:
    assert duration(secs) == text


@pytest.mark.parametrize(
    ("names", "text"),
    [("", ""), ("a", "a"), ("abc", "a, b, c"), ("abcd", "a, b, c, and 1 more"), ("abcdefg", "a, b, c, and 4 more")],
)
def test_of_many_the_first_are_listed_and_how_many_more_there_are(names: str, text: str) -> None:
    assert listed(names, most=3) == text


def test_what_has_commas_in_it_is_listed_with_semicolons() -> None:
    assert listed(["a, b", "c", "d"], most=2, separator="; ") == "a, b; c; and 1 more"
