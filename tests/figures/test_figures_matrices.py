"""Tables in colours: every word is written."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from aprlab import figures
from aprlab.errors import UsageError


def test_state_map_writes_every_word_and_knows_its_states() -> None:
    cells = [["found", "lost"], ["lost", "lost"]]
    ax = figures.state_map(cells, ["q", "k"], ["bare", "short"], ["found", "lost"])
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0, 1], [1, 1]])
    assert [text.get_text() for text in ax.texts] == ["found", "lost", "lost", "lost"]
    with pytest.raises(UsageError, match="unknown state 'lost'"):
        figures.state_map(cells, ["q", "k"], ["bare", "short"], ["found"])


def test_the_state_of_alarm_has_its_colour_wherever_it_stands() -> None:
    def colours(states: list[str], alarm: str | None) -> list[str]:
        ax = figures.state_map([states], ["row"], states, states, alarm=alarm)
        return [mpl.colors.to_hex(ax.images[0].cmap(n)) for n in range(len(states))]

    third = colours(["a", "b", "c"], None)[2]
    assert colours(["a", "b", "c"], "b")[1] == third
    assert colours(["a", "b"], "a")[0] == third
    assert len(set(colours(["a", "b", "c"], "a"))) == 3
    with pytest.raises(UsageError, match="unknown state 'z'"):
        figures.state_map([["a"]], ["row"], ["a"], ["a"], alarm="z")
