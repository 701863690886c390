"""Compute the kill matrix anew and write docs/kill-matrix.md and its figure: `python docs/make/kill_matrix.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from aprlab import figures, gates, paths
from aprlab.formats.writing import write_text

PAGE = Path(__file__).resolve().parents[1] / "kill-matrix.md"


def write(page: Path = PAGE) -> None:
    """The page, and a figure of the same name next to it."""
    found = gates.kill_matrix(paths.embedded_model(), progress=lambda id: print(id, file=sys.stderr))
    write_text(page, gates.markdown(found))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aprlab"}):
        axes = figures.kill_plot(gates.figure_cells(found), [gates.short(id) for id in gates.GATES])
        assert isinstance(axes.figure, Figure)
        axes.figure.savefig(page.with_suffix(".svg"), metadata={"Date": None, "Creator": None}, bbox_inches="tight")


if __name__ == "__main__":
    write()
