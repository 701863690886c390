"""View-models as HTML: strings in which what can be clicked has its key."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import matplotlib as mpl
import numpy as np

from aprlab.display.html import Cell, escape, shape, size, table
from aprlab.faults import Fault
from aprlab.faults.base import SECTIONS
from aprlab.onion.verdict import some
from aprlab.widgets.models.blocks import Block, BlockMicroscope
from aprlab.widgets.models.evidence import Evidence
from aprlab.widgets.models.files import Side
from aprlab.widgets.models.kernel import KernelStepper, ListingLine
from aprlab.widgets.models.onion import OnionExplorer, SideAnswer
from aprlab.widgets.models.tensors import COLUMNS, TensorBrowser
from aprlab.widgets.models.traces import TraceExplorer

FIELD_COLOURS = ("#f2b48a", "#9fd8c8", "#e8b9d4", "#8cc3e6", "#f5d48a", "#c9dcf0")  # pale: for black figures on top
EQUAL, BROKEN = "#ececec", "#d55e00"


def key(value: object) -> str:
    """The attribute that makes an element a button."""
    return f'data-key="{html.escape(str(value), quote=True)}"'


def map_of(name: str, label: str) -> str:
    """The attributes of what holds many buttons: one Tab stop, arrow keys inside, a name for screen readers.

    name: the same at every drawing, so that the place is kept.
    """
    return f'data-map="{html.escape(name)}" role="group" aria-label="{html.escape(label)}; arrow keys move, Enter chooses"'


def para(text: object, tone: str = "") -> str:
    """A paragraph in a tone of `richview.Cell`."""
    return f"<div>{escape(Cell(str(text), tone))}</div>" if str(text) else ""


# ── onion ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def fault_chips(faults: Sequence[Fault]) -> str:
    """Every fault as a button, by section, in a box that scrolls; its title is the tooltip."""
    parts = []
    for letter, title in SECTIONS.items():
        chips = "".join(
            f'<span class="chip" {key(f.id)} aria-label="{html.escape(f"{f.id}: {f.title}", quote=True)}" '
            f'title="{html.escape(f.title, quote=True)}">{html.escape(f.id)}</span>'
            for f in faults if f.section == letter
        )  # fmt: skip
        if chips:
            parts.append(f"<div><b>{html.escape(title)}</b></div><div class='chips'>{chips}</div>")
    names = map_of("faults", "faults by layer")
    box = f'<div class="scroll" data-scroll="faults" {names} style="max-height:14em;padding:4px 8px">{"".join(parts)}</div>'
    return para(f"{len(faults)} faults by layer: scroll to see all, click to switch one on or off", "mild") + box


def fault_stories(faults: Iterable[Fault]) -> str:
    """Title and story of each."""
    return "".join(
        f"<div><b>{html.escape(f.id)}</b> ({f.layer}): {html.escape(f.title)}. "
        f'<span style="color:var(--jp-ui-font-color2,#666)">{html.escape(" ".join(f.story.splitlines()))}</span></div>'
        for f in faults
    )


_STATE_SIGNS = {"waiting": ("○", "var(--jp-border-color2, #ccc)"), "running": ("◐", "#0072b2"), "done": ("●", "#00735c")}


def stages(onion: OnionExplorer) -> str:
    """The skins of the onion, one line each: waiting, running, clean, or what was found."""
    rows = []
    for stage in onion.stages:
        sign, colour = _STATE_SIGNS[stage.state]
        found = ""
        if stage.state == "done" and stage.clean is not None:
            sign, colour = ("✓", "#00735c") if stage.clean else ("✗", "#b3400a")
            more = f" (and {len(stage.found) - 2} more)" if len(stage.found) > 2 else ""
            found = f": {html.escape('; '.join(stage.found[:2]))}{more}" if stage.found else ": nothing"
        faded = "opacity:.55;" if stage.state == "waiting" else ""
        rows.append(
            f'<div class="stage" style="border-left:4px solid {colour};padding:0 8px;{faded}">'
            f'<span style="color:{colour}">{sign}</span> {html.escape(stage.words)}{found}</div>'
        )
    return "".join(rows)


def verdict_line(onion: OnionExplorer) -> str:
    """The word, and where the runs part."""
    verdict = onion.verdict
    if verdict is None:
        return ""
    words = {
        "same": "nothing is wrong", "equivalent": "other bytes, the same model", "broken": "broken",
        "healthy": "healthy, judged alone", "suspect": "suspect, nothing is proved",
        "unproved": "nothing is proved: it was not run, or cannot be judged by what it says",
        "ambiguous": "the bytes cannot decide", "not-comparable": "no statement is possible",
    }[verdict.verdict]  # fmt: skip
    line = f'<div style="font-size:1.15em">{Cell(words, verdict.tone).html()}</div>' + para(onion.refusal, "bad")
    parting = verdict.first_divergence
    if parting is not None and parting.get("point") not in (None, "none"):
        line += para(f"The runs diverge at {parting['point']}, position {parting.get('first_position', '?')}.")
    return line


def findings(onion: OnionExplorer) -> str:
    """One row a finding; a click opens its figure."""
    if not onion.findings:
        return ""
    rows = []
    for f in onion.findings:
        fault = Cell(f.fault or "no known fault", "mild" if f.harmless else "bad")
        rows.append([f.layer, fault, f.mechanism, some(f.tensors, 2) or "–", "show"])
    keys = [key(n) for n in range(len(rows))]
    return table(("layer", "fault", "what was done", "tensors", "figure"), rows, attributes=keys)


def evidence(found: Evidence | None) -> str:
    """Caption and table; the figure is in an image of its own."""
    if found is None:
        return ""
    head = f"<div>{html.escape(found.caption)}</div>"
    return head + (table(found.columns, found.rows, height="14em") if found.rows else "")


def repairs(onion: OnionExplorer) -> str:
    """A button for each repair."""
    if not onion.repairs:
        return ""
    chips = "".join(f'<span class="chip repair" {key(label)}>{html.escape(label)}</span>' for label in onion.repairs)
    names = map_of("repairs", "repairs")
    return f"<div><b>Repair</b> (click to apply, click again to undo)</div><div class='chips' {names}>{chips}</div>"


def answers(onion: OnionExplorer) -> str:
    """What each side says, the repairs that are applied now last and marked."""
    if onion.healthy is None:
        return ""
    rows = [["healthy", _said(onion.healthy), ""]]
    for answer in onion.answers:
        who = "as it is" if not answer.repaired else "repaired: " + ", ".join(answer.repaired)
        same = not answer.refusal and answer.text == onion.healthy.text
        rows.append([who, _said(answer), Cell("the same words", "good") if same else Cell("other words", "bad")])
    now = [False, *(answer.repaired == onion.repaired for answer in onion.answers)]
    return table(("side", f"answer to {onion.prompt!r}", ""), rows, strong=now)


def _said(answer: SideAnswer) -> str | Cell:
    if answer.refusal:
        return Cell(f"refused: {answer.refusal}", "bad")
    return repr(answer.text) if answer.text else Cell("nothing: the first token ends the answer", "open")


# ── trace ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def heat_map(explorer: TraceExplorer) -> str:
    """Layers × steps; each cell shows its error, small and large ones to a power of ten."""
    if not explorer.ready:
        return para("Press run: both sides are traced at every step of every layer.", "mild")
    steps, errors = explorer.map()
    limits = explorer.limits()
    head = "<th>layer</th>" + "".join(f'<th class="column"><span>{html.escape(step)}</span></th>' for step in steps)
    lines = []
    for layer, row in enumerate(errors):
        cells = "".join(_heat_cell(f"layers.{layer}.{step}", value, limits) for step, value in zip(steps, row, strict=True))
        lines.append(f"<tr><td><b>{layer}</b></td>{cells}</tr>")
    grid = f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    names = map_of("heat", "error by layer and step")
    return f'<div class="scroll" data-scroll="heat" {names} style="max-height:32em">{grid}</div>{_heat_legend(limits)}'


def _heat_cell(point: str, error: float, limits: tuple[float, float]) -> str:
    background, colour, text = heat_colour(error, limits)
    words = "equal bit for bit" if error == 0 else f"relative error {error:.3g}"
    return (
        f'<td {key(point)} title="{html.escape(point)}: {words}" aria-label="{html.escape(point)}: {words}" '
        f'style="background:{background};color:{colour}">{text}</td>'
    )


def heat_colour(error: float, limits: tuple[float, float]) -> tuple[str, str, str]:
    """(background, colour of the text, text) of an error: grey for 0, orange for NaN and Inf, viridis (no grey in it) between."""
    if error == 0:
        return EQUAL, "#666", "="
    if not np.isfinite(error):
        return BROKEN, "#fff", "∞"
    low, high = np.log10(limits)
    power = float(np.log10(error))
    red, green, blue, _ = mpl.colormaps["viridis"]((min(max(power, low), high) - low) / (high - low))
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    text = f"{error:.1f}" if 0.095 <= error < 10 else f"1e{round(power)}"
    return mpl.colors.to_hex((red, green, blue)), "#111" if light > 0.5 else "#fff", text


def _heat_legend(limits: tuple[float, float]) -> str:
    low, high = (round(power) for power in np.log10(limits))
    decades = range(low, high + 1, max(1, (high - low) // 3))
    shown = [(0.0, "equal bit for bit"), *((10.0**power, f"{10.0**power:g}") for power in decades), (np.inf, "NaN or Inf")]
    boxes = []
    for error, words in shown:
        background, _, _ = heat_colour(error, limits)
        boxes.append(f'<span style="background:{background};display:inline-block;width:1.2em">&nbsp;</span> {words}')
    return f'<div style="margin-top:3px">relative error, small and large ones to a power of ten: {" &nbsp; ".join(boxes)}</div>'


def trace_detail(explorer: TraceExplorer) -> str:
    """Shape, error, and the values furthest apart."""
    seen = explorer.detail
    if seen is None:
        return ""
    head = f"<div><b>{html.escape(seen.point)}</b>, {shape(seen.healthy.shape)} (positions first)</div>"
    if not seen.worst:
        return head + para("equal bit for bit at every position", "good")
    rows = [[position, index, f"{a:.6g}", f"{b:.6g}", f"{b - a:.4g}"] for position, index, a, b in seen.worst]
    columns = ("position", "index", "healthy", "other", "difference")
    return head + table(columns, rows, caption="the values furthest apart", height="16em")


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────

_STATUS_TONES = {"same": "good", "": ""}


def file_head(side: Side) -> str:
    """Format, size, config and inventory by type of a file that opens."""
    model = side.model
    if model is None:
        return ""
    sizes: dict[str, tuple[int, int]] = {}
    for tensor in model.tensors.values():
        count, nbytes = sizes.get(tensor.type.name, (0, 0))
        sizes[tensor.type.name] = count + 1, nbytes + tensor.nbytes
    types = [[name, count, size(nbytes)] for name, (count, nbytes) in sorted(sizes.items(), key=lambda item: -item[1][1])]
    config = [[name, str(value)] for name, value in asdict(model.config).items() if value is not None]
    facts = f"<div><b>{html.escape(side.label)}</b>, {html.escape(model.format.upper())}, {html.escape(model.load_line())}</div>"
    tables = table(("type", "tensors", "bytes"), types) + table(("config", "value"), config, height="16em")
    return f'{facts}<div style="display:flex;flex-wrap:wrap;gap:24px;align-items:flex-start">{tables}</div>'


def tensor_table(browser: TensorBrowser) -> str:
    """All rows that pass the filters; headings sort, rows open."""
    columns = COLUMNS if len(browser.sides) == 2 else tuple(c for c in COLUMNS if c not in ("status", "other type"))
    titles = {c: c for c in columns}
    if len(browser.sides) == 2:
        titles |= {"type": f"type in {browser.sides[0].label}", "other type": f"type in {browser.sides[-1].label}"}
    arrow = dict.fromkeys([browser.order], " ▼" if browser.descending else " ▲")
    head = "".join(f'<th {key(f"sort:{c}")} title="sort">{html.escape(titles[c])}{arrow.get(c, "")}</th>' for c in columns)
    lines = []
    for row in browser.rows:
        cells = []
        for column in columns:
            value = row.cell(column)
            shown: object = shape(value) if column == "shape" else size(value) if column == "bytes" else value
            if column == "status":
                shown = Cell(str(value), _STATUS_TONES.get(row.status, "bad"))
            cells.append(f"<td>{escape(shown)}</td>")
        lines.append(f"<tr {key(f'row:{row.name}')}>{''.join(cells)}</tr>")
    body = "".join(lines) or f'<tr><td colspan="{len(columns)}">no tensor matches</td></tr>'
    grid = f"<table style='width:100%'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" data-scroll="tensors" {map_of("tensors", "tensors")} style="max-height:26em">{grid}</div>'


def tensor_head(browser: TensorBrowser) -> str:
    """Counts, and why a file is refused."""
    shown = f"{len(browser.rows)} of {len(browser.all)} tensors shown"
    counts = ", ".join(f"{count} {status}" for status, count in browser.counts.items())
    parts = [f"<div>{shown}{f' ({counts})' if len(browser.sides) == 2 else ''}</div>"]
    parts += [
        para(f"{side.label} is refused by a strict reader: {side.refusal}", "bad") for side in browser.sides if side.refusal
    ]
    return "".join(parts)


def tensor_detail(browser: TensorBrowser) -> str:
    """The fingerprint on each side."""
    seen = browser.detail
    if seen is None:
        return para("A click on a tensor shows its fingerprint and its values.", "mild")
    rows = []
    labels = list(seen.prints)
    facts = {label: p.row() for label, p in seen.prints.items()}
    for name in ("type", "shape", "raw", "values", "mean", "std", "min", "max", "p50", "zeros", "nan", "inf"):
        texts = [_figure(facts[label].get(name)) for label in labels]
        same = len(set(texts)) < 2
        rows.append([name, *(text if same else Cell(text, "bad") for text in texts)])
    words = para(seen.words, "good" if seen.words.startswith("the same") else "bad")
    what = {"raw": "raw blocks (XXH3)", "values": "decoded values (XXH3)"}
    rows = [[what.get(str(row[0]), row[0]), *row[1:]] for row in rows]
    head = f"<div><b>{html.escape(seen.name)}</b></div>{words}"
    return head + (table(("fingerprint", *labels), rows) if labels else "")


def _figure(value: object) -> str:
    if isinstance(value, tuple):
        return shape(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def block_bytes(block: Block) -> str:
    """Every byte as a button in the colour of its field, sixteen a line, with the fields named above."""
    colours = {field.name: FIELD_COLOURS[n % len(FIELD_COLOURS)] for n, field in enumerate(block.fields)}
    legend = " ".join(
        f'<span class="chip" style="background:{colours[f.name]};color:#111">{html.escape(f.name)} ({f.stop - f.start} bytes)'
        "</span>"
        for f in block.fields
    )
    cells = []
    for n, byte in enumerate(block.raw.tolist()):
        if n % 16 == 0:
            cells.append(f'<span class="at">{n}</span>')
        name = block.field_of(n).name
        cells.append(
            f'<span {key(f"byte:{n}")} title="byte {n}, {html.escape(name)}: {byte}" '
            f'aria-label="byte {n} of {html.escape(name)}: {byte}" '
            f'style="background:{colours[name]}">{byte:02x}</span>'
        )
    return (
        f'<div class="chips">{legend}</div><div class="scroll" {map_of("bytes", "bytes of the block")} style="border:0">'
        f'<div class="bytes">{"".join(cells)}</div></div>'
    )


def block_fields(block: Block) -> str:
    """What the numbers in the fields are."""
    rows = [[field.name, f"{field.start} to {field.stop - 1}", field.shown] for field in block.fields]
    groups = [
        [n, f"{32 * n} to {32 * n + 31}", g.scale, f"{g.step:.6g}", g.minimum, f"{g.offset:.6g}"]
        for n, g in enumerate(block.groups)
    ]  # fmt: skip
    columns = ("group", "values", "scale, 6 bits", "d × scale", "minimum, 6 bits", "dmin × minimum")
    decoded = table(columns, groups, caption="the scales decoded: value = d × scale × number − dmin × minimum") if groups else ""
    return table(("field", "bytes", "numbers"), rows) + decoded


def block_values(scope: BlockMicroscope, most: int = 256) -> str:
    """The values, those furthest apart first; a click shows the bits that a value is made of."""
    rows = scope.rows()[:most]
    labels = [label for label in rows[0] if label not in ("value", "apart")] if rows else []
    body = []
    for row in rows:
        texts = [f"{row[label]:.6g}" for label in labels]
        tone = "bad" if row["apart"] else ""
        apart = Cell(f"{row['apart']:.4g}", tone) if len(labels) > 1 else Cell("")
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in [str(row["value"]), *texts, apart])
        body.append(f"<tr {key('value:' + str(row['value']))}>{cells}</tr>")
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ["value", *labels, *(["apart"] if len(labels) > 1 else [])])
    if len(labels) < 2:
        body = [line.replace("<td></td></tr>", "</tr>") for line in body]
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    names = map_of("values", "values of the block")
    return f'<div class="scroll" data-scroll="values" {names} style="max-height:22em">{grid}</div>'


def block_words(scope: BlockMicroscope) -> str:
    """What is marked, and what the search found."""
    parts = []
    if scope.byte >= 0:
        field = scope.first.field_of(scope.byte)
        touched = scope.first.values_of(scope.byte)
        parts.append(f"Byte {scope.byte} ({field.name}) makes {_spans(touched.tolist())}.")
    elif scope.value >= 0:
        bits = scope.first.bits_of(scope.value)
        made = "; ".join(f"{len(places)} bits of {name}" for name, places in bits.items())
        parts.append(f"Value {scope.value} is made of {made}.")
    else:
        parts.append("A click on a byte marks the values it makes, a click on a value the bits it is made of.")
    return para(" ".join(parts), "mild") + para(scope.worst_words)


def _spans(numbers: Sequence[int]) -> str:
    """``values 0 to 31 and 64``; long lists are cut."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    texts = [f"{a}" if a == b else f"{a} to {b}" for a, b in runs]
    if not texts:
        return "no value (its bits are not used, or are where nothing changes)"
    cut = [*texts[:6], f"{len(texts) - 6} more runs"] if len(texts) > 6 else texts
    return f"{len(numbers)} value{'s' if len(numbers) != 1 else ''}: {', '.join(cut)}"


# ── kernel ────────────────────────────────────────────────────────────────────────────────────────────────────────


def code(lines: Sequence[ListingLine], prefix: str, name: str, height: str = "26em", *, costs: bool = False) -> str:
    """Lines of a text, each a button; with what each cost beside its number."""
    out = []
    for line in lines:
        cost = ""
        if costs:
            c = line.cost
            words = "" if c is None else f"{c.warp_instructions} instr" + (f", {c.sectors} sect" if c.sectors else "")
            cost = f'<span class="cost">{words}</span>'
        out.append(
            f'<div {key(f"{prefix}:{line.number}")}><span class="n">{line.number}</span>{cost}'
            f"<span>{html.escape(line.text) or ' '}</span></div>"
        )
    names = map_of(name, f"lines of {name}")
    return f'<div class="scroll code" data-scroll="{html.escape(name)}" {names} style="max-height:{height}">{"".join(out)}</div>'


def registers(stepper: KernelStepper) -> str:
    """The watched lane's registers, changed ones first and marked; a click shows one in all lanes."""
    rows = stepper.registers()
    if not rows:
        return para("no register has been written yet", "mild")
    body = "".join(
        f"<tr {key(f'reg:{name}')}>"
        + "".join(f"<td>{html.escape(t)}</td>" for t in (name, _number(value), "changed" * changed))
        + "</tr>"
        for name, value, changed in rows
    )
    head = f"<tr><th>register</th><th>lane {stepper.lane}</th><th></th></tr>"
    grid = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" data-scroll="registers" {map_of("registers", "registers")} style="max-height:20em">{grid}</div>'


def lanes(stepper: KernelStepper) -> str:
    """One register in all lanes; those that take no part in the next instruction are faded."""
    values = stepper.lanes()
    if not values:
        return para("A click on a register shows it in every lane.", "mild")
    active = stepper.view.active or [True] * len(values)
    cells = "".join(
        f'<span {key(f"lane:{n}")} title="lane {n}" style="background:#dbe9f4;{"" if on else "opacity:.4;"}font-size:10px">'
        f"{_number(value)}</span>"
        for n, (value, on) in enumerate(zip(values, active, strict=True))
    )
    lines = f'<div class="bytes" style="grid-template-columns:repeat(8, minmax(4em, 1fr))">{cells}</div>'
    return f"<div><b>{html.escape(stepper.register)}</b> in lanes 0 to {len(values) - 1}, eight a line</div>{lines}"


def shared_memory(stepper: KernelStepper, most: int = 512) -> str:
    """Shared variables of the block as float32; what is zero is a dot."""
    parts = []
    for name, values in stepper.shared().items():
        words = [f"{'·' if v == 0 else _number(v)}" for v in values[:most]]
        lines = "".join(
            f"<div><span class='n'>{n}</span><span>{html.escape('  '.join(w.rjust(10) for w in words[n : n + 8]))}</span></div>"
            for n in range(0, len(words), 8)
        )
        cut = f", the first {most} shown" if len(values) > most else ""
        title = f"{_short_name(name)}: {4 * len(values)} bytes as {len(values)} float32{cut}"
        place = f'class="scroll code" data-scroll="{html.escape(name)}" style="max-height:12em"'
        parts.append(f"<div>{html.escape(title)}</div><div {place}>{lines}</div>")
    return "".join(parts) or para("this kernel uses no shared memory", "mild")


def _short_name(name: str) -> str:
    """The end of a mangled C++ name, which is the variable's own."""
    import re

    found = re.search(r"(\d+)([a-z_]\w*)$", name) if name.startswith("_Z") else None
    return found.group(2) if found else name


def _number(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def kernel_result(stepper: KernelStepper) -> str:
    """What the whole launch cost, and whether its result is right."""
    report, seen = stepper.report, stepper.comparison
    if report is None or seen is None or report.counters is None:
        return ""
    right = "right" if seen.right else f"WRONG: {seen.wrong} of {seen.values} values, {seen.unwritten} unwritten"
    how = "bit for bit" if seen.operation == "dequantise" else "within float32 rounding"
    first = para(f"the result of all blocks is {right}" + (f" ({how})" if seen.right else ""), "good" if seen.right else "bad")
    figures = {
        "blocks": report.blocks_run, "warp instructions": report.warp_instructions,
        "sectors of 32 bytes": report.counters.sectors, "shared wavefronts": report.counters.wavefronts,
        "DRAM bytes, at least": report.counters.dram_bytes,
    }  # fmt: skip
    return first + f"<div>{', '.join(f'{name} {value:,}' for name, value in figures.items())}</div>"
