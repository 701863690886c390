"""What the command line prints: the only module of this room that writes to a stream.

Results go to standard output; the load line, progress, notes and errors to standard error. Everything goes through
`printable`: text from a file is never obeyed by the terminal and never parsed as markup. A table at a terminal folds its
columns of prose and nothing else; in a pipe it is one line a row, so that ``grep`` finds a whole row by any part of it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from aprlab.display.plain_text import json_text, printable

if TYPE_CHECKING:
    from rich.console import Console

_GAP = 2  # blanks between columns
_PROSE = 24  # a column of prose is not folded to less

STYLES = {"ok": "green", "note": "yellow", "fail": "bold red", "pass": "green", "FAIL": "bold red", "void": "yellow"}


def say(text: object = "", *, end: str = "\n", flush: bool = False) -> None:
    """Text for standard output; its own line feeds stay. `flush`: show it now, also in a pipe."""
    print(printable(str(text), lines=True), end=end, flush=flush)


def note(text: object, *, end: str = "\n") -> None:
    """Text for standard error."""
    print(printable(str(text), lines=True), end=end, file=sys.stderr)


def complain(message: str) -> None:
    """One line of error on standard error."""
    print("aprlab:", printable(" ".join(message.split())), file=sys.stderr)


def show_stack(error: BaseException) -> None:
    """The stack of an error, for ``--debug``."""
    note("".join(traceback.format_exception(error)), end="")


def say_json(value: Any) -> None:
    """JSON: a line for each key of a dict or entry of a list, so that long lists of ids stay on theirs."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()

    def text(part: Any) -> str:
        return json_text(part, ascii_only=ascii_only)

    if isinstance(value, dict):
        lines, brackets = [f"{text(str(key))}: {text(item)}" for key, item in value.items()], "{}"
    else:
        lines, brackets = [text(item) for item in value], "[]"
    print(brackets[0] + "\n " + ",\n ".join(lines) + "\n" + brackets[1])


def say_state(state: str, text: str) -> None:
    """A line that begins with a word of `STYLES`, coloured at a terminal."""
    if not sys.stdout.isatty():
        say(f"{state:<5}{text}")
        return
    from rich.text import Text

    line = Text(f"{state:<5}", style=STYLES[state]).append(printable(text), style="default")
    _console(sys.stdout).print(line, soft_wrap=True)


def say_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, prose: Sequence[str] = (), right: Sequence[str] = ()
) -> None:
    """A table on standard output.

    Args:
        title: a line above it; none where empty.
        columns: headings; two columns may both have none.
        rows: a cell for each column.
        prose: headings of the columns that may be folded at a terminal; the others (names, ids, numbers) never are.
        right: headings of the columns that are set to the right.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if title:
        _say_title(printable(title))
    if sys.stdout.isatty():
        _say_rich(columns, cells, prose, right)
    else:
        _say_lines(columns, cells, right)


def _say_title(title: str) -> None:
    if sys.stdout.isatty():
        from rich.text import Text

        _console(sys.stdout).print(Text(title, style="italic"), soft_wrap=True)
    else:
        print(title)


def _say_lines(columns: Sequence[str], cells: list[list[str]], right: Sequence[str]) -> None:
    from rich.cells import cell_len

    widths = _widths(columns, cells)

    def line(row: Sequence[str]) -> str:
        parts = [
            " " * (width - cell_len(cell)) + cell if column in right else cell + " " * (width - cell_len(cell))
            for column, cell, width in zip(columns, row, widths, strict=True)
        ]
        return (" " * _GAP).join(parts).rstrip()

    print("\n".join(line(row) for row in ([list(columns)] if any(columns) else []) + cells))


def _say_rich(columns: Sequence[str], cells: list[list[str]], prose: Sequence[str], right: Sequence[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console(sys.stdout)
    widths = _widths(columns, cells)
    least = [min(width, _PROSE) if name in prose else width for name, width in zip(columns, widths, strict=True)]
    # never narrower than what must not be folded: a terminal that is goes on in its next line, without a break in the text
    console.width = max(console.width, sum(least) + 2 * len(columns) + len(columns) + 1)
    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for name, width in zip(columns, widths, strict=True):
        justify: Any = "right" if name in right else "left"
        if name in prose:
            table.add_column(Text(name), justify=justify, overflow="fold", min_width=min(width, _PROSE))
        else:
            table.add_column(Text(name), justify=justify, no_wrap=True, overflow="ignore", min_width=width)
    for row in cells:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console.print(table)


def _widths(columns: Sequence[str], cells: list[list[str]]) -> list[int]:
    from rich.cells import cell_len

    return [max([cell_len(name), *(cell_len(row[n]) for row in cells)]) for n, name in enumerate(columns)]


def _console(stream: TextIO) -> Console:
    """rich's console: colours on a terminal only, none with NO_COLOR; no markup, no emoji, no highlighting."""
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False, highlight=False)


def progress(total: float | None, unit: str, name: str = "", *, scale: bool = False) -> Any:
    """A progress bar on standard error where that is a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, unit_scale=scale, leave=False, desc=printable(name) or None)


class _NoBar:
    """What a verb does with a progress bar, where nobody looks: tqdm's import alone takes as long as some verbs."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: float = 1) -> None:
        """Some more is done."""

    def set_postfix_str(self, text: str) -> None:
        """What is done now."""
