"""The picture of a case about a server: its answer below ours, and no address."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback import Manners, serving
from matplotlib import pyplot as plt

from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.lab import case_figures
from aprlab.published import ANSWER, QUESTION


@pytest.mark.parametrize("shape", ["new", "none"])
def test_a_server_is_drawn_by_its_answer_and_not_by_its_address(tiny: Path, shape: str) -> None:
    session = Session(open_model(tiny), engine="reference")
    with serving(session, Manners(shape=shape)) as server:
        ax = case_figures.of_sources(tiny, [server.url], QUESTION)
    try:
        assert [label.get_text() for label in ax.get_yticklabels()] == ["our engine", "server 1"]
        assert "127.0.0.1" not in " ".join(text.get_text() for text in ax.figure.findobj(plt.Text))
        likely = ax.images[0].get_array()
        if shape == "new":
            assert likely[0].tolist() == pytest.approx(likely[1].tolist(), abs=1e-3)
        else:
            assert ax.texts[-1].get_text() == f"{ANSWER[:8].replace(' ', '␣')}…"
    finally:
        plt.close(ax.figure)
