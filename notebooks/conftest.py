"""nbval on the notebooks of this folder: what is compared and in which world the kernels start.

Text is compared word for word. Tables in HTML are compared by the text in them, pictures by how they look: the same
size and no part of another grey (`DIFFERENT`), so that another version of a font passes and another picture does not.
What a figure draws is compared to three digits besides, by the words that stand beside it (`aprlab.figures.described`).
Skipped are stderr (progress, warnings of libraries) and widget views (random ids).
"""

from __future__ import annotations

import base64
import copy
import html
import io
import os
import re
from typing import Any

import numpy as np
import pytest
from nbval.plugin import IPyNbCell
from PIL import Image

SKIPPED = ("stderr", "application/vnd.jupyter.widget-view+json", "application/vnd.aprlab.figure+json")
TILES = (24, 48)  # a picture is compared by the mean grey of so many tiles, rows and columns
DIFFERENT = 0.06  # of the way from black to white, in any tile

compare_text = IPyNbCell.compare_outputs


def words_of(page: str) -> str:
    """The text of a piece of HTML, one space between words."""
    page = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.S | re.I)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def tiles_of(png: str) -> tuple[tuple[int, int], np.ndarray]:
    """Size of a picture, and the mean grey of each of its tiles, 0 to 1."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    tiles = page.convert("L").resize(TILES[::-1], Image.Resampling.BOX)
    return picture.size, np.asarray(tiles, np.float64) / 255


def look_alike(one: str, other: str) -> bool:
    """Whether two pictures are the same to the eye; a legend or a label may push an edge by two hundredths."""
    if one.strip() == other.strip():
        return True
    (size, tiles), (other_size, other_tiles) = tiles_of(one), tiles_of(other)
    close = all(abs(a - b) <= 0.02 * a for a, b in zip(size, other_size, strict=True))
    return close and bool(np.abs(tiles - other_tiles).max() <= DIFFERENT)


def compare_all(cell: Any, test: list[dict], ref: list[dict], skip_compare: Any = None) -> bool:
    """nbval's comparison, of tables by their text and of pictures by their looks."""
    test, ref = copy.deepcopy(test), copy.deepcopy(ref)
    sides = [[output["data"] for output in outputs if "data" in output] for outputs in (test, ref)]
    for data in (*sides[0], *sides[1]):
        if "text/html" in data:
            data["text/html"] = words_of(data["text/html"])
    pictures = [[data for data in side if "image/png" in data] for side in sides]
    for number, pair in enumerate(zip(*pictures, strict=False), 1):
        alike = look_alike(pair[0]["image/png"], pair[1]["image/png"])
        for data, words in zip(pair, ("the one that was drawn now", "the one that is committed"), strict=True):
            data["picture"] = f"picture {number}" if alike else f"picture {number}: {words}, which looks different"
    return compare_text(cell, test, ref, skip_compare)


IPyNbCell.compare_outputs = compare_all


def pytest_collectstart(collector: pytest.Collector) -> None:
    if collector.path.suffix != ".ipynb":
        return
    os.environ.pop("MPLBACKEND", None)  # with agg the inline figures would vanish
    os.environ["TQDM_DISABLE"] = "1"
    collector.skip_compare = (*collector.skip_compare, *SKIPPED)  # type: ignore[attr-defined]
