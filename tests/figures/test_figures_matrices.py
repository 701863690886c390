"""Tables in colours: every word is written."""

from __future__ import annotations

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
