"""Write the table of codes in `docs/peel.md` anew: `python docs/make/peel_codes.py`."""

from __future__ import annotations

from pathlib import Path

from aprlab.onion.words import table_of_codes

PAGE = Path(__file__).parents[1] / "peel.md"
BEGIN, END = "<!-- codes: docs/make/peel_codes.py -->\n", "\n<!-- end of codes -->"


def page(text: str) -> str:
    """The text of the page with the table that the code gives between the two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the marks around the table of codes are missing")
    return before + BEGIN + table_of_codes() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
