"""The widgets: controls around view-models. A view reads its model after each change and writes into traits, nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w
import numpy as np

from aprlab import figures
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS
from aprlab.widgets import pages
from aprlab.widgets.clickable import Clickable
from aprlab.widgets.drawing import png, value_histogram
from aprlab.widgets.models.base import Observable
from aprlab.widgets.models.blocks import BlockMicroscope
from aprlab.widgets.models.files import known_files, nearby, shown
from aprlab.widgets.models.kernel import OPERATIONS, KernelStepper
from aprlab.widgets.models.onion import OnionExplorer
from aprlab.widgets.models.tensors import STATUSES, TensorBrowser
from aprlab.widgets.models.traces import MODES, TraceExplorer

_WRAP = w.Layout(flex_flow="row wrap", align_items="center", width="100%")
_WIDE = w.Layout(width="auto", max_width="46em")
_LABEL = {"description_width": "7em"}


class View(w.VBox):
    """A column of widgets around a view-model.

    After each change `refresh` is called: at once from the thread that made the change, which for long work is not the
    kernel's own, so the page stays alive and shows the progress. One thread refreshes at a time: who comes last reads the
    model last, so what is shown in the end is the model as it is in the end (and matplotlib draws for one thread only).
    """

    def __init__(self, model: Observable, children: Sequence[w.Widget]) -> None:
        self.model_ = model
        self._one_at_a_time = threading.RLock()  # a control that is set here may call back
        self.progress = w.FloatProgress(min=0, max=1, layout=w.Layout(width="12em"))
        self.status = Clickable()
        self.stop = w.Button(description="stop", icon="stop", disabled=True, layout=w.Layout(width="6em"))
        self.stop.on_click(lambda _: model.work.stop())
        self.bar = w.HBox([self.progress, self.stop], layout=w.Layout(display="none"))
        super().__init__([*children[:1], self.bar, self.status, *children[1:]], layout=w.Layout(width="100%", overflow="visible"))
        model.listen(self.update)
        self.update()

    def update(self) -> None:
        """Show the model as it is now."""
        with self._one_at_a_time:
            work = self.model_.work
            self.progress.value = work.done
            self.bar.layout.display = "flex" if work.busy else "none"
            self.stop.disabled = not work.busy
            self.status.html = pages.para(f"{work.doing} …") if work.busy else pages.para(work.error, "bad")
            self.refresh()

    def refresh(self) -> None:
        """What each view shows."""
        raise NotImplementedError

    def try_(self, action: Callable[[], object]) -> None:
        """An action of the user's: a refusal is shown in the status line, not in a hidden log."""
        try:
            action()
        except AprlabError as error:
            self.status.html = pages.para(str(error), "bad")


def _observed(widget: w.Widget, action: Callable[[Any], None]) -> w.Widget:
    widget.observe(lambda change: action(change["new"]), "value")
    return widget


def _lock(busy: bool, *controls: w.Widget) -> None:
    """While something is under way, what would disturb it cannot be pressed."""
    for control in controls:
        control.disabled = busy


def _switched(chosen: Sequence[str], id: str) -> list[str]:
    """What is chosen after a click on one: off where it was on, else on."""
    return [other for other in chosen if other != id] if id in chosen else [*chosen, id]


def _image() -> w.Image:
    return w.Image(format="png", layout=w.Layout(max_width="100%", display="none", object_fit="contain", align_self="flex-start"))


def _show(image: w.Image, data: bytes) -> None:
    """An image without data takes no room."""
    image.layout.display = "" if data else "none"
    if data != image.value:
        image.value = data


def _picker(name: str, value: str, options: Sequence[str], hint: str) -> w.Combobox:
    """A path to be typed, or chosen among those that are known."""
    return w.Combobox(
        value=value, options=list(dict.fromkeys(options)), description=name, placeholder=hint, ensure_option=False,
        continuous_update=False, style=_LABEL, layout=_WIDE,
    )  # fmt: skip


class _Sides(w.VBox):
    """Pickers of both sides of an explorer, and what opens them."""

    def __init__(self, paths: Sequence[str], action: Callable[[str, str], None]) -> None:
        here = [*paths, *known_files(), *nearby()]
        self.reference = _picker("reference", paths[0], here, "the path of a file")
        self.suspect = _picker("suspect", paths[1] if len(paths) > 1 else "", here, "the path of a second file, or nothing")
        self.opener = _button("open", lambda: action(self.reference.value, self.suspect.value), icon="folder-open")
        super().__init__([self.reference, self.suspect, w.HBox([self.opener])])


def _button(text: str, action: Callable[[], None], *, icon: str = "", primary: bool = False) -> w.Button:
    button = w.Button(description=text, icon=icon, button_style="primary" if primary else "", layout=w.Layout(width="auto"))
    button.on_click(lambda _: action())
    return button


# ── onion ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class OnionView(View):
    """Choose model and faults, run, watch the layers, open figures, repair."""

    def __init__(self, onion: OnionExplorer) -> None:
        self.onion = onion
        here = nearby()
        self.model_choice = _picker("reference", onion.model, [*onion.files, *here], "a model, or the path of a good file")
        self.form = w.ToggleButtons(
            options=[("break the file", "file"), ("break the reader of a healthy file", "reader")], style={"button_width": "auto"}
        )
        self.candidate = _picker("suspect", "", here, "a file of your own, GGUF or APR, instead of faults")
        self.prompt = w.Text(value=onion.prompt, description="question", style=_LABEL, layout=_WIDE)
        self.faults = Clickable(self._toggle)
        self.stories = Clickable()
        self.run = _button("run", lambda: self.try_(onion.run), icon="play", primary=True)
        self.clear = _button("no faults", lambda: self.try_(lambda: onion.choose(faults=())), icon="eraser")
        self.stages, self.verdict = Clickable(), Clickable()
        self.findings = Clickable(lambda key: self.try_(lambda: onion.look(int(key))))
        self.evidence, self.figure = Clickable(), _image()
        self.repairs = Clickable(lambda key: self.try_(lambda: onion.repair(key)))
        self.answers = Clickable()
        self.target = w.Text(value="fixed.apr", description="save as", style=_LABEL, layout=w.Layout(width="24em"))
        self.save = _button("save the repaired file", lambda: self.try_(lambda: onion.save(self.target.value)), icon="save")
        self.saved = Clickable()
        self.saving = w.VBox([w.HBox([self.target, self.save], layout=_WRAP), self.saved])
        _observed(self.model_choice, lambda value: self._choose(model=value))
        _observed(self.form, lambda value: self._choose(form=value))
        self.prompt.continuous_update = False
        _observed(self.candidate, lambda value: self._choose(candidate=value))
        _observed(self.prompt, lambda value: self._choose(prompt=value))
        top = w.VBox([
            self.model_choice, self.form, self.faults, self.stories, self.candidate, self.prompt,
            w.HBox([self.run, self.clear], layout=_WRAP),
        ], layout=w.Layout(width="100%"))  # fmt: skip
        super().__init__(
            onion,
            [
                top, self.stages, self.verdict, self.findings, self.evidence, self.figure, self.repairs, self.answers,
                self.saving,
            ],
        )

    def _choose(self, **change: Any) -> None:
        self.try_(lambda: self.onion.choose(**change))

    def _toggle(self, id: str) -> None:
        self._choose(faults=_switched(self.onion.faults, id))

    def refresh(self) -> None:
        onion = self.onion
        self.faults.html = pages.fault_chips(onion.choices)
        self.faults.currents = list(onion.faults)
        self.stories.html = pages.fault_stories(FAULTS[id] for id in onion.faults)
        _lock(onion.work.busy, self.run, self.clear, self.model_choice, self.form, self.candidate, self.prompt, self.save)
        self.saving.layout.display = "flex" if onion.can_save else "none"
        self.saved.html = pages.para(onion.saved, "good")
        idle = not onion.work.busy and onion.verdict is None
        self.stages.html = "" if idle and not onion.work.error else pages.stages(onion)
        self.verdict.html = pages.verdict_line(onion)
        self.findings.html = pages.findings(onion)
        self.findings.currents = [str(onion.shown)] if onion.shown >= 0 else []
        self.evidence.html = pages.evidence(onion.evidence)
        _show(self.figure, b"" if onion.evidence is None else onion.evidence.image)
        ready = onion.verdict is not None and bool(onion.answers)
        self.repairs.html = pages.repairs(onion) if ready else ""
        self.repairs.currents = list(onion.repaired)
        self.answers.html = pages.answers(onion)


# ── trace ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TraceView(View):
    """Choose faults, run both sides, click a cell of the map."""

    def __init__(self, explorer: TraceExplorer) -> None:
        self.explorer = explorer
        self.faults = Clickable(
            lambda id: self.try_(lambda: explorer.choose(faults=_switched(explorer.faults, id))),
            html=pages.fault_chips(explorer.choices),
        )
        self.stories = Clickable()
        self.prompt = w.Text(value=explorer.prompt, description="prompt", style=_LABEL, layout=_WIDE, continuous_update=False)
        self.mode = w.RadioButtons(options=[(words, mode) for mode, words in MODES.items()], layout=w.Layout(width="auto"))
        self.run = _button("run", lambda: self.try_(explorer.run), icon="play", primary=True)
        self.words = Clickable()
        self.map = Clickable(lambda key: self.try_(lambda: explorer.click(key)))
        self.detail, self.histogram, self.positions = Clickable(), _image(), _image()
        self._drawn: Any = None
        _observed(self.prompt, lambda text: self.try_(lambda: explorer.choose(prompt=text)))
        _observed(self.mode, lambda mode: self.try_(lambda: explorer.set_mode(mode)))
        pictures = w.HBox([self.histogram, self.positions], layout=w.Layout(flex_flow="row wrap", overflow="visible"))
        paths = [shown(path) for path in (explorer.model, explorer.other) if path is not None]
        self.files = _Sides(paths, lambda *files: self.try_(lambda: explorer.open(*files)))
        top = w.VBox([self.files, self.faults, self.stories, self.prompt, w.HBox([self.run])], layout=w.Layout(width="100%"))
        super().__init__(explorer, [top, self.words, self.mode, self.map, self.detail, pictures])

    def refresh(self) -> None:
        explorer = self.explorer
        self.faults.currents = list(explorer.faults)
        self.stories.html = pages.fault_stories(FAULTS[id] for id in explorer.faults)
        _lock(explorer.work.busy, self.run, self.prompt, self.files.opener)
        self.words.html = pages.para(explorer.words)
        self.map.html = pages.heat_map(explorer)
        self.map.currents = [explorer.chosen] if explorer.chosen else []
        self.detail.html = pages.trace_detail(explorer)
        if explorer.detail is not self._drawn:
            self._drawn = explorer.detail
            self._draw()

    def _draw(self) -> None:
        seen = self.explorer.detail
        if seen is None:
            _show(self.histogram, b"")
            _show(self.positions, b"")
            return
        sides = {"healthy": seen.healthy, "other": seen.other}
        _show(self.histogram, png(lambda ax: value_histogram(sides, ax), (3.95, 2.8)))
        _show(self.positions, png(lambda ax: position_bars(seen.by_position, ax), (3.95, 2.8)))


def position_bars(errors: np.ndarray, ax: Any) -> Any:
    """Relative error at each position; grey stumps are equal bit for bit."""
    with figures.style():
        shown = np.where(np.isfinite(errors), errors, 10.0)
        ax.bar(range(len(errors)), np.where(shown > 0, shown, 1e-8), color=["#D55E00" if e > 0 else "0.7" for e in errors])
        ax.set_yscale("log")
        ax.set_ylim(1e-8, max(10.0, float(shown.max()) * 2))
        ax.set_xlabel("position")
        ax.set_ylabel("relative error (grey: equal)")
    return ax


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────


class TensorView(View):
    """Sort by headings, filter, click a row."""

    def __init__(self, browser: TensorBrowser) -> None:
        self.browser = browser
        self.text = w.Text(placeholder="part of a name, e.g. attn bias", description="filter", style=_LABEL, layout=_WIDE)
        self.statuses = w.SelectMultiple(description="status", style=_LABEL, layout=w.Layout(width="22em"))
        self.head, self.table = Clickable(), Clickable(self._clicked)
        self.detail, self.histogram = Clickable(), _image()
        self._drawn: Any = None
        _observed(self.text, lambda text: browser.filter(text=text))
        _observed(self.statuses, lambda chosen: browser.filter(statuses=set(chosen)))
        self.files = _Sides([shown(side.path) for side in browser.sides], lambda *files: self.try_(lambda: browser.open(*files)))
        below = w.HBox(
            [self.detail, self.histogram], layout=w.Layout(flex_flow="row wrap", align_items="flex-start", overflow="visible")
        )
        super().__init__(browser, [w.VBox([self.files, self.text, self.statuses, self.head]), self.table, below])

    def _clicked(self, key: str) -> None:
        kind, _, name = key.partition(":")
        self.try_(lambda: self.browser.sort(name) if kind == "sort" else self.browser.choose(name))

    def refresh(self) -> None:
        browser = self.browser
        statuses = tuple(s for s in STATUSES if s in browser.counts)
        if self.statuses.options != statuses:  # they are known when both files have been compared
            self.statuses.options, self.statuses.rows = statuses, min(5, max(2, len(statuses)))
        self.statuses.layout.display = "" if len(browser.sides) == 2 else "none"
        _lock(browser.work.busy, self.files.opener)
        self.head.html = pages.tensor_head(browser)
        self.table.html = pages.tensor_table(browser)
        self.table.currents = [f"row:{browser.chosen}"] if browser.chosen else []
        self.detail.html = pages.tensor_detail(browser)
        if browser.detail is not self._drawn:
            self._drawn = browser.detail
            values: dict[str, np.ndarray] = {} if browser.detail is None else browser.detail.values
            _show(self.histogram, png(lambda ax: value_histogram(values, ax), (3.9, 2.8)) if values else b"")


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────


class BlockView(View):
    """Choose tensor, row, block, fault; click bytes and values."""

    def __init__(self, scope: BlockMicroscope) -> None:
        self.scope = scope
        self._busy = False  # the view itself is setting controls
        self.name = w.Dropdown(options=scope.names, value=scope.name, description="tensor", style=_LABEL, layout=_WIDE)
        self.row = w.BoundedIntText(min=0, max=0, description="row", style=_LABEL, layout=w.Layout(width="15em"))
        self.block = w.BoundedIntText(min=0, max=0, description="block", style=_LABEL, layout=w.Layout(width="15em"))
        self.fault = w.Dropdown(options=[("none", "")], description="fault", style=_LABEL, layout=_WIDE)
        self.worst = _button("go to the worst block", lambda: self.try_(scope.find_worst), icon="search")
        self.words = Clickable()
        self.bytes = Clickable(self._clicked)
        self.fields, self.figure = Clickable(), _image()
        self.values = Clickable(self._clicked)
        self._shown: Any = None
        _observed(self.name, lambda value: self._set(name=value))
        _observed(self.row, lambda value: self._set(row=value))
        _observed(self.block, lambda value: self._set(block=value))
        _observed(self.fault, self._fault)
        paths = [shown(side.path) for side in scope.sides.values()]
        self.files = _Sides(paths, lambda *files: self.try_(lambda: scope.open(*files)))
        place, search = w.HBox([self.row, self.block], layout=_WRAP), w.HBox([self.fault, self.worst], layout=_WRAP)
        top = w.VBox([self.files, self.name, place, search])
        super().__init__(scope, [top, self.words, self.bytes, self.fields, self.figure, self.values])

    def _set(self, **change: Any) -> None:
        if not self._busy:
            self.try_(lambda: self.scope.choose(**change))

    def _fault(self, id: str) -> None:
        if not self._busy:
            self.try_(lambda: self.scope.toggle(id))

    def _clicked(self, key: str) -> None:
        kind, _, number = key.partition(":")
        self.try_(lambda: self.scope.click(**{kind: int(number)}))

    def refresh(self) -> None:
        scope = self.scope
        self._busy = True
        try:
            tensor = scope.tensor()
            self.row.max, self.block.max = tensor.rows - 1, scope.blocks - 1
            if list(self.name.options) != scope.names:
                self.name.options = scope.names
            self.name.value, self.row.value, self.block.value = scope.name, scope.row, scope.block
            self.row.description, self.block.description = f"row, of {tensor.rows}", f"block, of {scope.blocks}"
            options = [("none", ""), *((id, id) for id in scope.faults)]
            if list(self.fault.options) != options:
                self.fault.options = options
            self.fault.value = scope.fault
        finally:
            self._busy = False
        _lock(scope.work.busy, self.files.opener, self.name, self.row, self.block, self.fault)
        self.worst.disabled = scope.work.busy or (len(scope.sides) < 2 and not scope.fault)
        self.words.html = pages.block_words(scope)
        bytes_, values = scope.marked()
        self.bytes.html = pages.block_bytes(scope.first)
        self.bytes.currents = [f"byte:{n}" for n in sorted(bytes_)]
        self.fields.html = pages.block_fields(scope.first)
        self.values.html = pages.block_values(scope)
        self.values.currents = [f"value:{n}" for n in sorted(values)]
        state = (scope.name, scope.row, scope.block, scope.fault, scope.work.busy)
        if state != self._shown and not scope.work.busy:
            group = 16 if "Q6_K" in tensor.type.name else 32
            _show(self.figure, png(lambda ax: figures.block_values(scope.values(), ax, group=group), (9, 2.8)))
        self._shown = state


# ── kernel ────────────────────────────────────────────────────────────────────────────────────────────────────────


class KernelView(View):
    """Choose a kernel; step; click lines, registers, lanes."""

    def __init__(self, stepper: KernelStepper) -> None:
        self.stepper = stepper
        self._busy = False
        self.operation = w.ToggleButtons(options=list(OPERATIONS), style={"button_width": "auto"})
        self.name = w.Dropdown(options=stepper.names, value=stepper.name, description="tensor", style=_LABEL, layout=_WIDE)
        self.fault = w.Dropdown(options=[("none", "")], description="seeded bug", style=_LABEL, layout=_WIDE)
        self.warp = w.BoundedIntText(min=0, max=0, description="warp", style=_LABEL, layout=w.Layout(width="13em"))
        self.lane = w.BoundedIntText(min=0, max=31, description="lane", style=_LABEL, layout=w.Layout(width="13em"))
        self.line = _button("line", lambda: self.try_(stepper.step), icon="step-forward", primary=True)
        self.ten = _button("ten lines", lambda: self.try_(lambda: stepper.step("line", 10)), icon="forward")
        self.instruction = _button("instruction", lambda: self.try_(lambda: stepper.step("instruction")), icon="angle-right")
        self.restart = _button("restart", lambda: self.try_(stepper.restart), icon="undo")
        self.profile = _button("run all, count, check", lambda: self.try_(stepper.profile), icon="tachometer")
        self.words, self.result = Clickable(), Clickable()
        self.file = Clickable()
        self.source = Clickable(self._clicked, layout=w.Layout(width="100%"))
        self.ptx = Clickable(self._clicked, layout=w.Layout(width="100%"))
        self.registers, self.lanes, self.shared = Clickable(self._clicked), Clickable(self._clicked), Clickable()
        self._text: Any = None
        _observed(self.operation, lambda value: self._choose(operation=value))
        _observed(self.name, lambda value: self._choose(name=value))
        _observed(self.fault, lambda value: self._choose(fault=value))
        _observed(self.warp, lambda value: None if self._busy else self.try_(lambda: stepper.watch(warp=value)))
        _observed(self.lane, lambda value: None if self._busy else self.try_(lambda: stepper.watch(lane=value)))
        column = w.Layout(flex="1 1 26em", min_width="18em", overflow="hidden", margin="0 8px 0 0")
        sides = w.HBox(
            [
                w.VBox([self.file, self.source], layout=column),
                w.VBox([Clickable(html="PTX of this kernel (a click runs to an instruction)"), self.ptx], layout=column),
            ],
            layout=w.Layout(flex_flow="row wrap", width="100%"),
        )
        below = w.HBox(
            [
                w.VBox([self.registers], layout=w.Layout(flex="0 1 22em", margin="0 8px 0 0")),
                w.VBox([self.lanes, self.shared], layout=column),
            ],
            layout=w.Layout(flex_flow="row wrap", width="100%"),
        )
        buttons = w.HBox([self.line, self.ten, self.instruction, self.restart, self.profile], layout=_WRAP)
        top = w.VBox([self.operation, self.name, self.fault, w.HBox([self.warp, self.lane], layout=_WRAP), buttons])
        super().__init__(stepper, [top, self.words, self.result, sides, below])

    def _choose(self, **change: Any) -> None:
        if not self._busy:
            self.try_(lambda: self.stepper.choose(**change))

    def _clicked(self, key: str) -> None:
        kind, _, rest = key.partition(":")
        actions: dict[str, Callable[[], None]] = {
            "line": lambda: self.stepper.run_to(int(rest)),
            "ptx": lambda: self.stepper.run_to_ptx(int(rest)),
            "reg": lambda: self.stepper.watch(register=rest),
            "lane": lambda: self.stepper.watch(lane=int(rest)),
        }
        self.try_(actions[kind])

    def refresh(self) -> None:
        stepper = self.stepper
        _lock(
            stepper.work.busy, self.operation, self.name, self.fault, self.warp, self.lane, self.line, self.ten,
            self.instruction, self.restart, self.profile,
        )  # fmt: skip
        if stepper.work.busy:
            return  # the machine is at work in another thread
        self._busy = True
        try:
            self.operation.value, self.name.value = stepper.operation, stepper.name
            options = [("none", ""), *((id, id) for id in stepper.faults)]
            if list(self.fault.options) != options:
                self.fault.options = options
            self.fault.value = stepper.fault
            self.warp.max, self.warp.value, self.lane.value = (stepper.threads + 31) // 32 - 1, stepper.warp, stepper.lane
        finally:
            self._busy = False
        self.words.html, self.result.html = pages.para(stepper.words()), pages.kernel_result(stepper)
        text = (stepper.kernel.entry, stepper.fault, stepper.file, stepper.report)
        if text != self._text:
            self._text = text
            self.file.html = pages.para(
                f"CUDA source: {stepper.file}" + (" (a click runs to a line)" if not stepper.report else "")
            )
            self.source.html = pages.code(stepper.source(), "line", f"source {stepper.file}", costs=stepper.report is not None)
            self.ptx.html = pages.code(stepper.ptx(), "ptx", "ptx")
        view = stepper.view
        self.source.currents = [f"line:{view.line}"] if not view.finished else []
        self.ptx.currents = [f"ptx:{view.ptx_line}"] if not view.finished else []
        self.registers.html = pages.registers(stepper)
        self.registers.currents = [f"reg:{name}" for name in [stepper.register] if name]
        self.lanes.html = pages.lanes(stepper)
        self.lanes.currents = [f"lane:{stepper.lane}"] if stepper.lanes() else []
        self.shared.html = pages.shared_memory(stepper)


__all__ = ["BlockView", "KernelView", "OnionView", "TensorView", "TraceView", "View"]
