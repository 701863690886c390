"""A table of states says each state in words, with one sign and colour for each role."""

from __future__ import annotations

import pytest

from aprlab.display.state_tables import StateTable
from aprlab.errors import UsageError

TONES = {"found": "good", "lost": "bad"}


def test_states_are_words_with_a_sign() -> None:
    table = StateTable({"<q>": ["found", "lost"], "k": ["lost", "lost"]}, ("a", "b"), TONES, "what is found")
    page = table._repr_html_()
    assert page.count("✓ found") == 1 and page.count("✗ lost") == 3 and "&lt;q&gt;" in page and "what is found" in page
    assert repr(table).splitlines() == ["what is found", "     a      b", "<q>  found  lost", "k    lost   lost"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [({}, "needs a row"), ({"q": ["found"]}, "1 states for 2"), ({"q": ["found", "odd"]}, "no tone for state 'odd'")],
)
def test_what_is_no_table_is_refused(rows: dict[str, list[str]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        StateTable(rows, ("a", "b"), TONES)
