"""The page of departures says to users what the table of the tests says."""

from __future__ import annotations

from pathlib import Path

from departures import DEPARTURES

PAGE = Path(__file__).parents[2] / "docs" / "departures.md"


def test_the_page_lists_each_departure_in_the_words_of_the_table() -> None:
    page = PAGE.read_text()
    for name, departure in DEPARTURES.items():
        row = f"| {name.replace('_', ' ')} | {departure.tensorflow} | {departure.stepguard} | {departure.reason} |"
        assert row in page
