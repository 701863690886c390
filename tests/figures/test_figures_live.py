"""The data of a live figure is what was drawn, in data units; pages with it are whole, and nothing in it ends a script."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from aprlab import figures
from aprlab.figures import in_cells
from aprlab.figures.in_cells import picture
from aprlab.figures.live import MOST, live_data, packed
from aprlab.lab import live_pages


def numbers(text: str) -> list[float]:
    return np.frombuffer(base64.b64decode(text), "<f4").tolist()


def drawn(ax: Any) -> dict[str, Any]:
    data = live_data(ax.figure)
    json.dumps(data, allow_nan=False)
    (axes,) = data["axes"]
    return axes


def test_lines_scales_and_labels() -> None:
    rows = [{"layer": n, "l2": 10.0**n} for n in range(3)]
    axes = drawn(figures.norm_plot({"GG$UF": rows}, diverged=1))
    line, mark = axes["lines"]
    assert (numbers(line["x"]), numbers(line["y"]), line["label"]) == ([0, 1, 2], [1, 10, 100], "GG$UF")
    assert numbers(mark["x"]) == [1, 1]
    assert axes["y"]["scale"] == "log" and axes["x"]["label"] == "layer"


def test_a_map_has_its_values_colours_and_places() -> None:
    values = np.array([[0.0, 1e-3, np.inf], [0.5, 20.0, 1e-12]])
    axes = drawn(figures.error_map(values, range(2), ["q", "k", "v"], xlabel="", limits=(1e-6, 1.0)))
    (found,) = axes["maps"]
    assert (found["rows"], found["columns"]) == (2, 3)
    np.testing.assert_allclose(numbers(found["values"]), values.ravel().astype(np.float32), rtol=1e-3)
    places = list(base64.b64decode(found["places"]))
    assert places[0] == places[2] == 255, "equal and infinite have no colour of the scale"
    assert (places[4], places[5]) == (63, 0), "beyond the limits: the ends"
    assert [word for _, word in axes["x"]["ticks"]] == ["q", "k", "v"]
    assert axes["bars"][0]["filled"] is True
    marks = found["bar"]["marks"]
    assert [round(value, 9) for part, value in marks] == [10.0**n for n in range(-6, 1)], "the colour bar, low to high"
    assert [part for part, _ in marks] == pytest.approx([n / 6 for n in range(7)], abs=1e-3)
    assert found["bar"]["label"].startswith("relative error")


def test_maps_that_share_a_colour_bar_all_have_it_and_no_other_map() -> None:
    with figures.style():
        _, axes = plt.subplots(1, 3)
    errors = np.array([[1e-3, 0.5]])
    for ax, limits, bar in zip(axes, ((1e-3, 1.0), (1e-3, 1.0), (1e-5, 1.0)), (False, axes[:2], False), strict=True):
        figures.error_map(errors, range(1), ["q", "k"], ax, xlabel="", limits=limits, bar=bar)
    first, second, third = (each["maps"][0] for each in live_data(axes[0].figure)["axes"])
    assert first["bar"] == second["bar"] and "bar" not in third


def test_a_map_of_states_says_what_its_values_mean() -> None:
    axes = drawn(figures.tensor_map({"token_embd.weight": "fine", "blk.0.ffn_up.weight": "odd"}, ["fine", "odd"]))
    assert (axes["states"], axes["whole"]) == (["fine", "odd"], [0]) and "bar" not in axes["maps"][0]


def test_bars_points_bands_and_words() -> None:
    axes = drawn(figures.inventory_bars({"GGUF": {"Q4_K": 2**20, "F32": 2**21}}))
    assert [(numbers(bar["corners"])[3], bar["label"]) for bar in axes["bars"]] == [(1, "GGUF"), (2, "GGUF")]
    x = np.linspace(-1, 1, 3 * MOST, dtype=np.float32)
    axes = drawn(figures.logits_plot(x, x, ("GGUF", "APR"), top={0: "a"}))
    assert axes["points"][0]["of"] == 3 * MOST and len(numbers(axes["points"][0]["x"])) == MOST
    assert axes["square"]
    axes = drawn(figures.trace_plot({"a": [{"layer": n, "mean": n, "std": 1} for n in range(2)]}))
    assert (min(numbers(axes["bands"][0]["y"])), max(numbers(axes["bands"][0]["y"]))) == (-1, 2)
    assert axes["bands"][0]["alpha"] == 0.15
    axes = drawn(figures.word_map([["in"]], np.array([[0.5]]), [3], ["<|im"]))
    assert axes["words"] == [[0, 0, "in", "#000000"]]


def test_whole_numbers_are_whole_as_a_front_end_writes_them() -> None:
    """Else a notebook that is opened and saved in JupyterLab would differ."""
    text = json.dumps(live_data(figures.norm_plot({"a": [{"layer": n, "l2": 10.0**n} for n in range(3)]}).figure))
    assert not re.search(r"[ \[]-?\d+\.0[,\]}]", text)


def test_the_place_of_an_axes_is_where_its_picture_has_it() -> None:
    """The frame is dark in the picture exactly where the data says that the axes end."""
    with figures.style():
        fig, ax = plt.subplots()
        ax.set(xticks=[], yticks=[])
        ax.plot([0, 1], [0, 1], color="white")
        ax.spines[:].set_visible(True)
        ax.grid(visible=False)
    (axes,) = live_data(fig)["axes"]
    png, size = picture(fig)
    grey = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert abs(grey.shape[1] - 2 * size["width"]) <= 1
    rows, columns = np.nonzero(grey < 128)
    found = [columns.min(), rows.min(), columns.max(), rows.max()]
    wanted = [part * side for part, side in zip(axes["box"], [*grey.shape[::-1]] * 2, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=3)


def test_in_a_cell_the_axes_are_to_the_pixel_where_the_picture_made_just_before_has_them() -> None:
    """The size of tick labels, and so a layout, depends on the resolution: the data take the layout of the picture."""
    with figures.style():
        fig, ax = plt.subplots()
        ax.plot([0, 1], [0, 98765.4], color="white")
        ax.set_ylabel("a label")
        ax.spines[:].set(visible=True, color="red")
        ax.grid(visible=False)
    png, _ = in_cells._picture_first(fig)
    (axes,) = in_cells._data_then(fig)["axes"]
    colours = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    rows, columns = np.nonzero((colours[..., 0] > 200) & (colours[..., 1] < 90))
    found = [columns.min(), rows.min(), columns.max(), rows.max()]
    wanted = [part * side for part, side in zip(axes["box"], [*colours.shape[1::-1]] * 2, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1.6)
    anew = in_cells._data_then(fig)["axes"][0]
    assert {**anew, "box": 0} == {**axes, "box": 0}, "where no picture was asked for the figure is laid out for the data"


def test_numbers_are_rounded_to_four_digits() -> None:
    np.testing.assert_allclose(numbers(packed([1.23456, -98765.4, 0, 1e-40])), [1.235, -98770, 0, 0], rtol=1e-6, atol=1e-38)
    assert np.isnan(numbers(packed(np.ma.masked_array([1.0], mask=[True])))[0])


def test_a_page_of_hostile_words_stays_one_page() -> None:
    hostile = "</script><script>alert(1)</script><!--"
    with figures.style():
        ax = figures.norm_plot({hostile: [{"layer": 0, "l2": 1.0}, {"layer": 1, "l2": 2.0}]})
        ax.set_title(hostile)
    png, size = picture(ax.figure)
    output = {
        "data": {
            "image/png": base64.b64encode(png).decode(), "text/plain": figures.described(ax.figure),
            "application/vnd.aprlab.figure+json": live_data(ax.figure),
        },
        "metadata": {"image/png": size},
    }  # fmt: skip
    part = live_pages.figure_html(output)
    assert part.count("<script") == part.count("</script>") == 1
    assert f'width="{size["width"]}"' in part
    page = live_pages.with_script(f"<html><body>{part}</body></html>")
    assert page.count("<script") == page.count("</script>") == 2 and page.endswith("</script></body></html>")
    assert "http" not in page.replace("data:image", "")
    assert live_pages.with_script("<body></body>") == "<body></body>"
    assert live_pages.figure_html({"data": {"image/png": "Zm9v"}}).count("<script") == 0


def test_words_for_who_cannot_see_the_picture() -> None:
    fig, (left, right) = plt.subplots(1, 2)
    left.set_title("What 'is' left")
    right.set_title("Right")
    assert live_pages.alt_text(figures.described(fig)) == "Figure: What 'is' left; Right."
    assert live_pages.alt_text("") == "Figure: without a title."


def test_the_script_parses() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node here")
    script = Path(live_pages.__file__).parents[1] / "widgets/jupyter/labextensions/aprlab/static/live.js"
    done = subprocess.run([node, "--check", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
