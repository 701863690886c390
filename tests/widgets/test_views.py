"""Views without a kernel: controls drive the model, the model's changes arrive in the traits."""

from __future__ import annotations

import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import ipywidgets as w
import numpy as np
import pytest

from aprlab import widgets
from aprlab.faults import FAULTS
from aprlab.widgets import pages
from aprlab.widgets.clickable import Clickable
from aprlab.widgets.drawing import value_histogram
from aprlab.widgets.models.base import Observable
from aprlab.widgets.models.traces import TraceExplorer
from aprlab.widgets.views import View, position_bars

PNG = b"\x89PNG"


def drawn(image: w.Image) -> bool:
    """There is a picture, and it is shown."""
    return bytes(image.value).startswith(PNG) and image.layout.display == ""


def clickables(view: View) -> Iterator[Clickable]:
    """Every page in a view."""
    waiting = [view]
    while waiting:
        widget = waiting.pop()
        waiting += getattr(widget, "children", ())
        if isinstance(widget, Clickable):
            yield widget


def well_formed(view: View) -> None:
    """All pages are closed and escaped, and what is marked is there."""
    for widget in clickables(view):
        root = ET.fromstring(f"<body>{widget.html.replace('&nbsp;', ' ')}</body>")
        keys = {element.get("data-key") for element in root.iter()}
        assert set(widget.currents) <= keys


def test_a_click_in_the_browser_is_a_call() -> None:
    heard: list[str] = []
    widget = Clickable(heard.append, html="<b data-key='a'>x</b>")
    widget._handle_custom_msg({"key": "a"}, [])
    widget._handle_custom_msg({"key": 3}, [])
    widget._handle_custom_msg("nonsense", [])
    assert heard == ["a"]
    script, style = (Path(widgets.__file__).with_name(name).read_text() for name in ("clickable.js", "clickable.css"))
    assert widget._esm == script
    assert widget._css == style
    assert "http" not in script + style, "nothing is fetched"


def test_who_refreshes_last_has_read_last() -> None:
    """A worker's refresh that is still under way when the kernel's thread changes the model does not undo the change."""
    model, reading, shown = Observable(), threading.Event(), threading.Event()
    word = "before"

    class Slow(View):
        def refresh(self) -> None:
            seen = word
            if threading.current_thread() is worker:
                reading.set()
                shown.wait(0.3)
            self.status.html = seen
            shown.set()

    worker = threading.Thread(target=model.changed)
    view = Slow(model, [])
    shown.clear()
    worker.start()
    assert reading.wait(10)
    word = "after"
    model.changed()
    worker.join()
    assert view.status.html == "after"


def test_onion(tmp_path: Path) -> None:
    view = widgets.onion_explorer()
    well_formed(view)
    view.faults.click("GH-191")
    view.faults.click("GH-190")
    view.faults.click("q4k-min-lost")
    assert view.faults.currents == ["GH-190", "q4k-min-lost"]
    assert all(FAULTS[id].title.split("`")[0] in view.stories.html for id in view.faults.currents)
    assert view.stages.html == ""
    view.run.click()
    view.onion.work.wait()
    well_formed(view)
    assert "✗ broken" in view.verdict.html
    assert view.findings.html.count("data-key") == 2
    view.findings.click("1")
    view.onion.work.wait()
    assert drawn(view.figure)
    view.findings.click("1")
    assert view.figure.layout.display == "none"
    view.findings.click("0")
    view.onion.work.wait()
    assert "model.embed_tokens.weight" in view.evidence.html
    for label in view.onion.repairs:
        view.repairs.click(label)
        view.onion.work.wait()
    assert "✓ the same words" in view.answers.html
    well_formed(view)
    assert view.saving.layout.display == "flex"
    view.target.value = str(tmp_path / "fixed.apr")
    view.save.click()
    view.onion.work.wait()
    assert "written" in view.saved.html
    assert (tmp_path / "fixed.apr").is_file()
    view.save.click()
    assert "exists already" in view.status.html
    view.form.value = "reader"
    assert view.onion.form == "reader"
    assert "GH-190" not in view.faults.html
    assert view.answers.html == ""
    view.candidate.value = "/nowhere.apr"
    view.run.click()
    assert "looked at as a file" in view.status.html
    view.clear.click()
    assert view.faults.currents == []


def test_traces(tiny: Path) -> None:
    view = widgets.trace_explorer(tiny, ["lost-k-biases"])
    well_formed(view)
    view.run.click()
    view.explorer.work.wait()
    assert view.map.html.count("data-key") == 8 * 15
    view.map.click("layers.0.k")
    assert view.map.currents == ["layers.0.k"]
    assert drawn(view.histogram)
    assert drawn(view.positions)
    view.mode.value = "introduced"
    assert view.explorer.mode == "introduced"
    well_formed(view)
    view.faults.click("rope-norm")
    assert view.faults.currents == ["lost-k-biases", "rope-norm"]
    assert view.stories.html.count("<b>") == 2
    assert view.histogram.layout.display == "none"
    view.faults.click("lost-k-biases")
    assert view.explorer.faults == ("rope-norm",)
    view.map.click("layers.0.k")
    assert "run it first" in view.status.html
    view.faults.click("lost-k-biases")
    view.run.click()
    view.explorer.work.wait()
    view.mode.value = "introduced"
    steps, errors = view.explorer.map()
    wrong = [step for step, error in zip(steps, errors[0], strict=True) if error > 0]
    assert wrong == ["k", "q_rope", "k_rope"], "what each of the two faults does itself, and nothing that follows from it"


def test_tensors(tiny: Path, mislabelled: Path) -> None:
    view = widgets.tensor_browser(tiny, mislabelled)
    view.browser.work.wait()
    assert view.statuses.options == ("same", "type", "unreadable")
    well_formed(view)
    assert "is refused by a strict reader" in view.head.html
    view.text.value = "ffn_down"
    assert view.table.html.count("row:") == 8
    view.statuses.value = ("type",)
    view.table.click("sort:name")
    assert "▲" in view.table.html
    first = view.browser.rows[0].name
    view.table.click(f"row:{first}")
    view.browser.work.wait()
    assert drawn(view.histogram)
    assert "other values" in view.detail.html
    well_formed(view)
    view.text.value = "nothing like it"
    assert "no tensor matches" in view.table.html
    one = widgets.tensor_browser()
    well_formed(one)
    assert "status" not in one.table.html


def test_blocks(tiny: Path, one_scale: Path) -> None:
    view = widgets.block_microscope(tiny, one_scale, tensor="blk.0.ffn_gate.weight")
    well_formed(view)
    assert drawn(view.figure)
    assert view.bytes.html.count("byte:") == 144
    view.bytes.click("byte:0")
    assert 230 < len(view.values.currents) <= 256  # all whose number is not zero
    view.values.click("value:3")
    assert "4 bits of qs" in view.words.html
    view.fault.value = "q4k-d-dmin"
    view.worst.click()
    view.scope.work.wait()
    assert (view.row.value, view.block.value) == (view.scope.row, view.scope.block)
    assert "furthest from q4k-d-dmin" in view.words.html
    view.name.value = "output.weight"
    assert view.bytes.html.count("byte:") == 210
    assert view.fault.value == ""
    well_formed(view)
    view.name.value = "output_norm.weight"
    well_formed(view)
    assert not any(fault == "q4k-d-dmin" for _, fault in view.fault.options)


def test_kernels() -> None:
    view = widgets.kernel_stepper(operation="matvec")
    well_formed(view)
    text = view.source.html
    view.line.click()
    view.instruction.click()
    assert view.source.html is text or view.source.html == text  # only the mark moves
    assert len(view.ptx.currents) == 1
    view.ten.click()
    register = view.stepper.registers()[0][0]
    view.registers.click(f"reg:{register}")
    assert view.lanes.html.count("lane:") == 32
    view.lanes.click("lane:7")
    assert view.lane.value == 7
    view.profile.click()
    view.stepper.work.wait()
    assert "✓ the result of all blocks is right" in view.result.html
    assert " instr" in view.source.html
    assert "uses no shared memory" in view.shared.html
    well_formed(view)
    view.warp.value = 1
    assert view.stepper.view.warp == 1
    view.fault.value = "q4k-min-lost"
    assert view.result.html == ""
    view.profile.click()
    view.stepper.work.wait()
    assert "✗ the result of all blocks is WRONG" in view.result.html
    view.name.value = "output.weight"
    assert "float32" in view.shared.html
    view.operation.value = "dequantise"
    assert view.stepper.kernel.entry == "dequantise_q6_k_f32"
    assert view.warp.max == 7


def test_other_files_are_opened_and_a_refused_one_is_said(tiny: Path, mislabelled: Path) -> None:
    view = widgets.tensor_browser(tiny)
    assert view.statuses.layout.display == "none"
    view.files.suspect.value = str(mislabelled)
    view.files.opener.click()
    view.browser.work.wait()
    well_formed(view)
    assert view.statuses.layout.display == ""
    assert "is refused by a strict reader" in view.head.html
    view.files.suspect.value = "nothing.apr"
    view.files.opener.click()
    assert "nothing.apr" in view.status.html
    assert len(view.browser.sides) == 2


def test_controls_are_locked_while_something_is_under_way(tiny: Path) -> None:
    onion, traces, kernel = widgets.onion_explorer(), widgets.trace_explorer(tiny), widgets.kernel_stepper()
    blocks = widgets.block_microscope(tiny)
    locked: list[tuple[View, list[w.Widget]]] = [
        (onion, [onion.run, onion.clear, onion.model_choice, onion.form, onion.candidate, onion.prompt]),
        (traces, [traces.run, traces.prompt]),
        (blocks, [blocks.files.opener, blocks.name, blocks.row, blocks.block, blocks.fault, blocks.worst]),
        (kernel, [kernel.operation, kernel.name, kernel.fault, kernel.warp, kernel.lane, kernel.line, kernel.ten,
                  kernel.instruction, kernel.restart, kernel.profile]),
    ]  # fmt: skip
    for view, controls in locked:
        work, seen = view.model_.work, []
        work.start("long", lambda work=work, seen=seen, controls=controls: (
            work.tell("on", 0.5), seen.extend(control.disabled for control in controls)
        ))  # fmt: skip
        work.wait()
        assert work.error == ""
        assert seen == [True] * len(controls)
        assert not any(control.disabled for control in controls if control is not blocks.worst)


@pytest.mark.parametrize(
    ("error", "background", "text"),
    [
        (0.0, pages.EQUAL, "="),
        (float("inf"), pages.BROKEN, "∞"),
        (float("nan"), pages.BROKEN, "∞"),
        (1e-3, None, "1e-3"),
        (1.04, None, "1.0"),
        (1e9, "#fde725", "1e9"),
    ],
)
def test_colours_of_the_heat_map(error: float, background: str | None, text: str) -> None:
    colour = pages.heat_colour(error, (1e-7, 1.0))
    assert colour[2] == text
    assert background is None or colour[0] == background


def test_errors_of_a_broken_run_are_told_apart(tiny: Path) -> None:
    """They lie around 1: the scale is that of the map, so they are not all of one colour."""
    explorer = TraceExplorer(tiny, ["rope-norm"])
    explorer.run()
    explorer.work.wait()
    page = pages.heat_map(explorer)
    colours = re.findall(r'style="background:(#\w{6})', page)
    assert len(set(colours)) > 20 and pages.EQUAL in colours
    assert page.rpartition("equal bit for bit")[2].count("</span> 10 ") == 1, "the scale reaches above 1"


def test_runs_of_numbers_are_put_together() -> None:
    assert pages._spans([1, 2, 3, 7]) == "4 values: 1 to 3, 7"
    assert pages._spans([5]) == "1 value: 5"
    assert "2 more runs" in pages._spans(list(range(0, 16, 2)))
    assert pages._spans([]).startswith("no value")


def test_figures_show_what_they_are_given() -> None:
    from matplotlib.figure import Figure

    ax = value_histogram({"a": np.arange(100, dtype=np.float32), "b": np.array([np.nan, 1, 2], np.float32)}, Figure().subplots())
    counts = [patch.get_data().values.sum() for patch in ax.patches]
    assert counts == [100, 2]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b (1 NaN or Inf)"]
    ax = position_bars(np.array([0.0, 0.5, np.inf]), Figure().subplots())
    assert [bar.get_height() for bar in ax.patches] == [1e-8, 0.5, 10.0]
    assert len({bar.get_facecolor() for bar in ax.patches}) == 2
